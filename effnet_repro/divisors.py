"""How a training step is cut evenly."""


def mixing_group(
    whole: int,  # Images in a training step, >= 1
    wanted: int,  # Images in a group, e.g. the published micro-batch
) -> int:  # `wanted` where it divides `whole`
    """Return the largest divisor of `whole` from 2 to `wanted`, or else the smallest from 2; 1 where there is none."""
    divisors = [n for n in range(2, whole + 1) if whole % n == 0] or [1]
    return max((n for n in divisors if n <= wanted), default=divisors[0])
