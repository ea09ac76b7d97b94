"""Image training from Python: the same `fit` that `rnode-cli train` calls, on the digits or any other recipe.

The paper's ImageNet 64x64 on four GPUs: python train_images.py imagenet64 --devices 4
"""

import argparse
from pathlib import Path

from rnode_plugin import get_recipe, load_flow
from rnode_plugin.errors import ConfigError
from rnode_plugin.experiments.recipes.kind import SampleRequest
from rnode_plugin.experiments.training.fit import fit
from rnode_plugin.experiments.training.plan import RunOptions


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="digits", help="a name that `rnode-cli recipes` lists")
    parser.add_argument("--steps", type=int, help="[default: 25 of the digits, else as long as the recipe says]")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--devices", default="auto", help="how many, or which: 4, or 0,2")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines of a distributed run")
    parser.add_argument("--output", default="train_images.png", help="file of the samples")
    options = parser.parse_args()

    settings = [
        f"training.seed={options.seed}",
        "training.sample_images=0",  # samples are drawn below
        "regularizers.kinetic=0.01",  # the default of every recipe; here is where to change it
        "regularizers.jacfrob=0.01",
    ]
    if options.recipe == "digits":
        settings += [f"training.max_steps={options.steps or 25}", "optimizer.warmup=10"]
    elif options.steps:
        settings += [f"training.max_steps={options.steps}", "training.max_epochs=none"]
    recipe = get_recipe(options.recipe).override(settings)
    request = SampleRequest(count=16, temperatures=(0.6, 0.8, 1.0), columns=16)
    try:
        recipe.kind.check_request(recipe.data, request, Path(options.output))
    except ConfigError as error:  # now, not after the training
        parser.error(f"no samples of {recipe.name} can be drawn: {error}")
    run, result, first_process, _ = fit(
        recipe, RunOptions(progress=False), devices=options.devices, num_nodes=options.num_nodes
    )

    if not first_process:  # of several, one reports
        return
    evaluation = result.evaluation
    if evaluation is None:  # a signal stopped it; fit(recipe, RunOptions(resume=run.path)) continues
        raise SystemExit(f"stopped by {result.stopped} after {result.steps} steps")
    print(f"steps              {result.steps} in {result.training_seconds:.1f} s")
    print(f"bits/dim dirty     {evaluation.means['dirty'].mean:.3f} ± {evaluation.means['dirty'].stderr:.3f}")
    print(f"bits/dim clean     {evaluation.means['clean'].mean:.3f} (density at the bins' centers: no bound)")
    print(f"NFE of a solve     {evaluation.nfe_mean:.0f}, all blocks together")
    for name, value in evaluation.penalties.items():
        print(f"{name + ' / dim':<18} {value:.4f}")
    print(f"run                {run.path}")

    flow = load_flow(run.path)  # the best weights, on the CPU
    recipe.kind.write_samples(recipe.data, flow, Path(options.output), request)


if __name__ == "__main__":
    main()
