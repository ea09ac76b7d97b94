"""Writes the packaged weights in the form of this tree: python .ci/pretrained.py COMMIT [--data-root FOLDER].

Run it whenever the form of a recipe, of the facts or of the header changes. It reads each file as git has it in
COMMIT, which the last change of the form has written, and needs no code of that commit. The tensors stay the same
to the bit. Settings that recipes no longer have are left out, and are listed together with the new ones: if a
setting has got another name or another meaning, change its value in `_recipe_of`. Facts of the data stay. With
FOLDER they are made again from the data set in it, on which alone these weights were trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import Any

import torch
from safetensors.torch import load, save

from rnode_plugin import get_recipe, load_flow
from rnode_plugin.experiments.data.facts import Facts
from rnode_plugin.experiments.recipes.pretrained import PRETRAINED, pretrained_file
from rnode_plugin.experiments.recipes.recipe import Recipe
from rnode_plugin.experiments.training.checkpoints import checksum, facts_of, header_with

KEY, CHECKSUM = "rnode_plugin", "sha256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="the commit that has the files in the form before")
    parser.add_argument("--data-root", help="the folder of the data set, to make the facts again")
    options = parser.parse_args()
    for name in PRETRAINED:
        file = pretrained_file(name)
        assert file is not None
        before = subprocess.check_output(["git", "show", f"{options.commit}:./{file.name}"], cwd=file.parent)
        tensors, metadata = load(before), _metadata(before)
        old = json.loads(metadata[KEY])
        recipe = _recipe_of(old["recipe"])
        tensors.pop("rnode_plugin.trained_on", None)
        if options.data_root is None:
            facts = facts_of({KEY: old})
        else:
            data = recipe.at_root(options.data_root).load_data(all_val=True)
            facts = Facts.of(data, recipe.data.given, trained_on=())
        header = json.dumps(header_with(recipe, facts)[KEY])
        written = save(tensors, {"format": "pt", KEY: header, CHECKSUM: checksum(tensors, header)})
        file.write_bytes(written)
        after = load(written)
        assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
        load_flow(name)
        print(f"{file}: {old['format']} -> {json.loads(header)['format']}, facts {facts}")


def _metadata(contents: bytes) -> dict[str, str]:
    """Read the metadata of a .safetensors file, which begins with the length of its JSON header."""
    length = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + length])["__metadata__"]


def _recipe_of(plain: dict[str, Any]) -> Recipe:
    """Read a recipe in the form before, and list what is left out and what is new."""
    known = get_recipe(plain["name"]).to_plain()
    settings: dict[str, Any] = {}
    for group, value in plain.items():
        if isinstance(value, dict) and group != "regularizers":
            form = known.get(group, {})
            print(f"{group}: left out {sorted(value.keys() - form)}, new {sorted(form.keys() - value)}")
            value = {key: each for key, each in value.items() if key in form}
        if group in known:
            settings[group] = value
    return Recipe.from_plain(settings)


if __name__ == "__main__":
    main()
