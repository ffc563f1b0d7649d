"""Two processes that fine-tune a network: equal to one. All of it is marked long."""

import pytest
from process_runs import Runs, checkpoint, worst

pytest.importorskip("jax")
pytestmark = pytest.mark.long
TOLERANCE = 1e-5  # As in test_processes.py, but these learn faster, and rounding grows with them


class Finetunings(Runs):
    "A fine-tuning of what a run has left in `source`, which process 0 alone can read"

    source, flags = None, ()

    def words(self, index, *more):
        source = self.source if index == 0 else self.folder / "nothing here"
        words = ["finetune", source, "--run-dir", self.run_dir(index), "--budget", "case"]
        batches = ["--global-batch-size", 16, "--micro-batch-size", 4, "--seed", 3]
        return [*map(str, [*words, *batches, *self.flags, *more])]


HOW = {
    "last segment": ("--image-size", 48),
    "whole body, clean": ("--variable-filter", "Top", "block", "--protocol", "clean"),
    "new classifier": ("--new-head", "--variable-filter", "Top", "block"),
}


@pytest.mark.parametrize("how", HOW)
def test_two_processes_finetune_as_one_and_one_goes_on(tmp_path, how):
    first = Runs(tmp_path, count=1)
    first.alone("--max-steps", 2, "--no-validation")
    some = []
    for name, count in (("two", 2), ("one", 1)):
        (tmp_path / name).mkdir()
        some.append(Finetunings(tmp_path / name, count=count))
        some[-1].source, some[-1].flags = first.run_dir(), HOW[how]
    two, one = some
    two.start("--max-steps", 2)
    assert two.wait(400) == [0, 0], (two.err(0), two.err(1))
    assert not two.run_dir(1).exists()
    for each in (two, one):  # anew, and where two stopped
        each.alone("--max-steps", 3, "--no-validation")
    (step, ours), (last, theirs) = checkpoint(two.run_dir()), checkpoint(one.run_dir())
    assert step == last == 3 and worst(ours, theirs) < TOLERANCE
