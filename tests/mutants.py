"""One-line faults of the package with the tests that must see them, and a runner: ``python tests/mutants.py``.

The runner puts one fault at a time into a copy of the tree and runs its tests. It fails if they pass. Words on the
command line choose the faults whose file or description contains one of them. ``--check`` only looks for the lines.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 600  # seconds that the tests of one fault may take


class Mutant(NamedTuple):
    """A fault, ``new`` in the place of ``old``, which stands once in a function of a file of the package.

    ``old`` is as short as it can be, so that renaming what stands beside it changes nothing here.
    """

    fault: str
    file: str
    function: str  # with the classes around it, as in Stepper.step
    old: str
    new: str
    tests: str  # node ids of pytest in tests/, the narrowest that must see the fault


MUTANTS = [
    # the library
    Mutant(
        "penalties are integrated over dt, not over |dt|",
        "solvers/step.py",
        "Stepper._integrate",
        ".abs()",
        "",
        "test_solvers.py::test_a_linear_field_is_solved_as_in_closed_form",
    ),
    Mutant(
        "the mean of step penalties is divided by one step more",
        "solvers/step.py",
        "Totals.solution",
        "/ self.steps",
        "/ (self.steps + 1)",
        "test_regularizers.py::test_values_and_gradients_are_those_of_the_accepted_steps",
    ),
    Mutant(
        "a sampled stage loses its share",
        "solvers/step.py",
        "_integrate_rows",
        "(dt * share)",
        "dt",
        "test_solvers.py::test_a_sampled_integral_is_unbiased",
    ),
    Mutant(
        "pixels of a color are one pixel too close",
        "core/trace_estimators.py",
        "_colors",
        "(radius +",
        "max(radius,",
        "test_colors.py::test_the_trace_of_a_stack_is_exact",
    ),
    Mutant(
        "pixels of a color share pixels that both depend on, in an exact Frobenius norm",
        "core/trace_estimators.py",
        "Exact.draw",
        "radius if",
        "radius - 1 if",
        "test_colors.py::test_the_frobenius_norm_is_exact_for_more_products",
    ),
    Mutant(
        "the longest safe step has the exponent of another order",
        "solvers/controller.py",
        "StepController.safe_length",
        "self.method.order",
        "(self.method.order + 1)",
        "test_solvers.py::test_the_safe_step_is_the_longest_that_would_have_passed",
    ),
    Mutant(
        "the error of a step is scaled by its start alone",
        "solvers/controller.py",
        "StepController.error_ratio",
        "torch.max(z.abs(), step.z.abs()",
        "z.abs(",
        "test_torchdyn.py::test_same_values_and_evaluations_as_torchdyn",
    ),
    Mutant(
        "the budget of evaluations is smaller by one",
        "solvers/adaptive.py",
        "_check_trial",
        "- 1 ",
        "",
        "test_solvers.py::test_a_budget_of_exactly_the_evaluations_suffices",
    ),
    Mutant(
        "an adjoint's gradient with respect to the start time has the other sign",
        "solvers/adjoint.py",
        "_sweep",
        "-pass_",
        "pass_",
        "test_solvers.py::test_a_linear_field_is_solved_as_in_closed_form",
    ),
    Mutant(
        "an adjoint takes penalties forward in time",
        "solvers/adjoint.py",
        "_Backward.__init__",
        " self.sign *",
        "",
        "test_solvers.py::test_a_linear_field_is_solved_as_in_closed_form",
    ),
    Mutant(
        "the length of a difference has a gradient",
        "core/trace_estimators.py",
        "Difference.linearize",
        "detach().",
        "",
        "test_evaluator.py::test_the_length_of_a_difference_has_no_gradient",
    ),
    Mutant(
        "straightness is multiplied by the length of the time",
        "regularizers/rates.py",
        "_beyond_the_chord",
        "/ length",
        "* length",
        "test_regularizers.py::test_straightness_beside_kinetic_and_of_a_straight_path",
    ),
    Mutant(
        "a warm-up begins one step early",
        "core/schedules.py",
        "LinearWarmup.__call__",
        "step ",
        "(step + 1) ",
        "test_training.py::test_a_lambda_that_warms_up_follows_the_steps_of_likelihood",
    ),
    Mutant(
        "a quarter of the images is flipped",
        "flows/multiscale.py",
        "random_flip",
        "0.5",
        "0.25",
        "test_multiscale.py::test_flips_mirror_about_half_of_the_images",
    ),
    Mutant(
        "the log-determinant of a table's scale has the other sign",
        "flows/table.py",
        "TableFlow._enter",
        "-scale",
        "scale",
        "test_table_flow.py::test_a_linear_field_has_a_gaussian_density",
    ),
    Mutant(
        "a table is scaled by another deviation",
        "flows/table.py",
        "TableFlow.standardize",
        "False",
        "True",
        "test_table_runs.py::test_the_nll_of_a_run_is_in_the_unit_of_the_file",
    ),
    Mutant(
        "a trajectory has the gradient of the mode",
        "torchdyn/neural_ode.py",
        "NeuralODE.trajectory",
        ", gradient=Autograd()",
        "",
        "test_torchdyn.py::test_a_trajectory_in_a_block_is_a_call_by_steps",
    ),
    Mutant(
        "a warm start takes the whole safe step",
        "solvers/controller.py",
        "StepController.warm_start",
        "self.method.safety * ",
        "",
        "test_solvers.py::test_safe_steps_are_kept_by_direction",
    ),
    Mutant(
        "a placeholder of a layer keeps the time of a solve",
        "torchdyn/field.py",
        "Slots.clear",
        "slot.restore(value)",
        "pass",
        "test_torchdyn.py::test_placeholders_of_a_users_layer_are_filled",
    ),
    Mutant(
        "a product is compared with no quotient",
        "core/checks.py",
        "_check_derivatives",
        " velocity.differs(slope)",
        " False",
        "test_check_field.py::test_a_wrong_field_is_refused",
    ),
    Mutant(
        "the gradient of a product is compared with no quotient",
        "core/checks.py",
        "_check_derivatives",
        " or gradient.differs(second * scale)",
        "",
        "test_check_field.py::test_a_wrong_field_is_refused",
    ),
    Mutant(
        "no check looks for samples that mix",
        "core/checks.py",
        "check_field",
        "if apart:",
        "if False:",
        "test_check_field.py::test_a_wrong_field_is_refused",
    ),
    Mutant(
        "one net is checked for all",
        "core/checks.py",
        "once",
        "owner,",
        "nn.Module,",
        "test_check_field.py::test_a_use_is_checked_until_it_was_conclusive_or_three_times",
    ),
    Mutant(
        "a net is not checked again in training",
        "core/evaluator.py",
        "Evaluator.check",
        'getattr(net, "training", None),',
        "",
        "test_check_field.py::test_another_use_of_a_net_is_checked_anew",
    ),
    Mutant(
        "a field is checked for densities alone",
        "core/evaluator.py",
        "Evaluator.check",
        "wants or",
        'wants & {"trace"} or',
        "test_check_field.py::test_each_interface_checks_a_field_once",
    ),
    # the application
    Mutant(
        "Muon looks ahead the wrong way",
        "experiments/training/optimizers.py",
        "Muon._step_kernels",
        'kernel.grad.lerp(state["mean"]',
        'state["mean"].lerp(kernel.grad',
        "test_optimizers.py::test_kernels_are_pytorchs_muon",
    ),
    Mutant(
        "the bias correction of Adam is one step late",
        "experiments/training/optimizers.py",
        "Muon._step_vectors",
        'beta1 ** state["step"])',
        'beta1 ** (state["step"] + 1))',
        "test_optimizers.py::test_biases_are_adams",
    ),
    Mutant(
        "the log sums accumulated batches",
        "experiments/training/module.py",
        "RnodeModule._log_step",
        "/ len(self._terms) ",
        "",
        "test_training.py::test_a_lambda_that_warms_up_follows_the_steps_of_likelihood",
    ),
    Mutant(
        "a smaller last batch of a validation counts in full",
        "experiments/training/module.py",
        "RnodeModule.validation_step",
        "len(batch))",
        "1)",
        "test_training.py::test_the_numbers_of_a_row",
    ),
    Mutant(
        "accumulated batches draw the same noise",
        "experiments/training/module.py",
        "RnodeModule.training_step",
        "part * self._world + ",
        "",
        "test_experiment.py::test_accumulated_batches_draw_the_noise_of_as_many_devices",
    ),
    Mutant(
        "a resumed run does not begin warm",
        "experiments/training/module.py",
        "RnodeModule.on_load_checkpoint",
        'progress["safe_steps"]',
        "{}",
        "test_training.py::test_interrupted_and_resumed_equals_uninterrupted",
    ),
    Mutant(
        "accumulated batches share their first steps",
        "experiments/training/module.py",
        "RnodeModule.training_step",
        "(device",
        "(0",
        "test_experiment.py::test_accumulated_batches_draw_the_noise_of_as_many_devices",
    ),
    Mutant(
        "a second backward pass begins with the steps of the first",
        "solvers/adjoint.py",
        "_sweep",
        "pass_.longest_safe_step)",
        "step := pass_.longest_safe_step)\n        call.safe_step = step",
        "test_solvers.py::test_an_adjoint_begins_with_what_its_forward_pass_knew",
    ),
    Mutant(
        "likelihood begins with the moments of flow matching",
        "experiments/training/module.py",
        "RnodeModule.on_train_batch_start",
        "batch_idx % self._batches == 0 and 0 < self.global_step == self.recipe.matching",
        "False",
        "test_training.py::test_the_gradient_of_the_likelihood_is_clipped",
    ),
    Mutant(
        "flow matching is clipped",
        "experiments/training/module.py",
        "RnodeModule.on_before_optimizer_step",
        "matches else",
        "False else",
        "test_training.py::test_the_gradient_of_the_likelihood_is_clipped",
    ),
    Mutant(
        "the error from the noise forgets the draws",
        "experiments/evaluation/likelihood.py",
        "_Solves.mean",
        "(draws * count)",
        "count",
        "test_evaluation.py::test_means_and_standard_errors_are_over_images_not_batches",
    ),
    Mutant(
        "the variance of the samples loses all of the noise",
        "experiments/evaluation/likelihood.py",
        "_draws_needed",
        " / 2",
        "",
        "test_evaluation.py::test_draws_make_the_noise_small_against_the_images",
    ),
    Mutant(
        "the NFE depend on earlier solves",
        "experiments/evaluation/likelihood.py",
        "_Solves.nfe",
        "False",
        "True",
        "test_evaluation.py::test_nfe_is_that_of_separate_solves_of_the_same_batches",
    ),
    Mutant(
        "every batch of samples has the same latents",
        "experiments/samples.py",
        "_draw",
        ", first",
        "",
        "test_evaluation.py::test_temperatures_share_their_latents",
    ),
    Mutant(
        "one degree of freedom too many",
        "experiments/reports/configurations.py",
        "paired_difference",
        "(len(part) - 1",
        "len(part",
        "test_reports.py::test_configurations_are_compared_image_by_image",
    ),
    Mutant(
        "the noise of a validation is that of the device's own count of batches",
        "experiments/training/module.py",
        "RnodeModule.validation_step",
        " * self.trainer.world_size + self.global_rank",
        "",
        "test_two_processes.py::test_two_processes_train_as_one_that_accumulates",
    ),
    Mutant(
        "the last weights are saved before the best ones",
        "experiments/training/saves.py",
        "Checkpoints.on_validation_end",
        "best)\n        self._save(trainer, self._folder.run.last",
        "last)\n            self._save(trainer, self._folder.run.best",
        "test_killed_runs.py::test_killed_between_two_writes[after the last checkpoint]",
    ),
    Mutant(
        "the training time is the time of the last step",
        "experiments/training/rows.py",
        "Rows.on_train_batch_end",
        "training_seconds +=",
        "training_seconds =",
        "test_training.py::test_training_time_has_waits_and_no_validation",
    ),
    Mutant(
        "the median time of a step is a mean",
        "experiments/quantities.py",
        "numbers_of",
        ".median",
        ".mean",
        "test_reports.py::test_the_table",
    ),
    Mutant(
        "the NFE of training are from its start",
        "experiments/quantities.py",
        "numbers_of",
        "-max(1, len(nfe) // 10) :",
        ": max(1, len(nfe) // 10)",
        "test_reports.py::test_the_table",
    ),
    Mutant(
        "the identity of a table ignores the split",
        "experiments/data/identity.py",
        "of_samples",
        'f"{tuple(samples.shape)}".encode()',
        'b""',
        "test_facts.py::test_samples_have_the_hash_of_shapes_and_bytes",
    ),
]


def extent(source: str, name: str) -> slice:
    """Where the function of that name stands in the text of a file; empty if there is none."""
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        inner = [each for each in ast.walk(node) if getattr(each, "name", None) == part and each is not node]
        if not inner:
            return slice(0, 0)
        node = inner[0]
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    assert node.end_lineno is not None
    lines = source.splitlines(keepends=True)
    return slice(len("".join(lines[: node.lineno - 1])), len("".join(lines[: node.end_lineno])))


def with_fault(source: str, mutant: Mutant) -> str | None:
    """The text of a file with the fault; None if its place is not there exactly once."""
    place = extent(source, mutant.function)
    body = source[place]
    if body.count(mutant.old) != 1:
        return None
    return source[: place.start] + body.replace(mutant.old, mutant.new) + source[place.stop :]


def misplaced() -> list[str]:
    """The faults whose place is not there exactly once, as messages."""
    return [
        f"{each.function} of {each.file} must hold once: {each.old}\nChange or drop the fault in tests/mutants.py."
        for each in MUTANTS
        if with_fault((ROOT / "rnode_plugin" / each.file).read_text(), each) is None
    ]


def copy_of_the_tree(target: Path) -> None:
    """Copy what git sees, changes and new files too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, nodes: list[str], output: Path) -> None:
    """Run tests of a copy in this process, which ends with the exit code of pytest."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)  # of processes that a test starts
    options = ["-q", "-x", "-m", "", "-p", "no:cacheprovider"]  # slow tests too
    sys.exit(int(pytest.main([*options, *(f"tests/{node}" for node in nodes)])))


def exit_code(tree: Path, nodes: list[str], output: Path) -> int | None:
    """The exit code of pytest for these tests of a copy; None if they did not end."""
    # a copy of this process, which has imported what takes seconds, but nothing of the package
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, nodes, output))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def run_mutants(mutants: list[Mutant], tree: Path) -> int:
    """Run the tests of each fault in a copy of the tree, and return how many faults they did not see."""
    copy_of_the_tree(tree)
    output = tree / "output.txt"
    if exit_code(tree, sorted({each.tests for each in mutants}), output) != pytest.ExitCode.OK:
        print(output.read_text())
        sys.exit("These tests do not pass without a fault either, so they would show nothing.")
    sys.dont_write_bytecode = True  # a file with a fault must leave none
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    seen = 0
    for each in mutants:
        start, path, kept = time.monotonic(), tree / "rnode_plugin" / each.file, tree / "kept"
        shutil.copy2(path, kept)
        path.write_text(with_fault(path.read_text(), each) or "")
        code = exit_code(tree, [each.tests], output)
        shutil.move(kept, path)  # with its time, so that its bytecode is valid again
        first = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read_text(), re.M)
        by = first[1] if first else "no end" if code is None else f"exit code {code}"
        killed = code is None or code == pytest.ExitCode.TESTS_FAILED
        seen += killed
        state = f"killed by {by}" if killed else f"SURVIVED ({by})"
        print(f"{each.file}: {each.fault}: {state}, {time.monotonic() - start:.0f} s", flush=True)
    return len(mutants) - seen


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--check"]
    if problems := misplaced():
        sys.exit("\n".join(problems))
    if "--check" in sys.argv:
        return
    chosen = [each for each in MUTANTS if not words or any(word in f"{each.file} {each.fault}" for word in words)]
    if not chosen:
        sys.exit(f"no fault has one of the words {', '.join(words)}.")
    import pandas  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import scipy.stats  # noqa: F401
    import torchdyn.core  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        survived = run_mutants(chosen, Path(folder))
    print(f"{len(chosen) - survived} of {len(chosen)} faults are seen.")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
