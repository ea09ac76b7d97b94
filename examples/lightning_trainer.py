"""Image flows in a Lightning Trainer that you configure, with any callbacks, loggers and strategies, on the digits.

On several devices: python lightning_trainer.py --devices 2
"""

import argparse
from pathlib import Path

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from rnode_plugin import ImageDataModule, RnodeModule, get_recipe
from rnode_plugin.experiments.recipes.kind import SampleRequest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--devices", default="auto", help="how many, or which: 4, or 0,2")
    parser.add_argument("--resume", help="checkpoint to continue from, such as lightning/last.ckpt")
    parser.add_argument("--output", default="lightning_trainer.png", help="file of the samples")
    options = parser.parse_args()

    recipe = get_recipe("digits").override(["optimizer.warmup=10", "training.val_images=100"])
    module = RnodeModule(recipe)
    best = ModelCheckpoint("lightning", monitor="val/bpd", save_last=True)
    trainer = Trainer(
        max_steps=options.steps,
        check_val_every_n_epoch=None,  # validate by steps, across epochs
        val_check_interval=min(30, options.steps),
        devices=options.devices,
        log_every_n_steps=1,
        logger=CSVLogger("lightning"),
        callbacks=[best, EarlyStopping("val/bpd", patience=5), LearningRateMonitor()],
        enable_progress_bar=False,
    )
    data = ImageDataModule(recipe)
    trainer.fit(module, data, ckpt_path=options.resume)
    (scores,) = trainer.validate(module, data, verbose=False)  # of the last step

    if trainer.is_global_zero:  # of several processes, one reports
        print(f"steps      {trainer.global_step}")
        print(f"bits/dim   {scores['val/bpd']:.3f} on {recipe.training.val_images} held-out digits")
        print(f"NFE        {scores['val/nfe']:.0f} per batch, all blocks together")
        request = SampleRequest(count=16, temperatures=(0.6, 0.8, 1.0), columns=16)
        recipe.kind.write_samples(recipe.data, module.flow, Path(options.output), request)


if __name__ == "__main__":
    main()
