"""GPU kernels by what they compute, and the operations that are made of them."""
