"""What is measured of images and of tables: name, unit, scores and samples, one object for each kind of data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...recipes.schema import TableData
from .base import Evaluation, FlowInput, Mean, Measure, Quantity, batch_of
from .images import BitsPerDim, EvaluationResult, ImageMeasure
from .tables import NatsPerRow, TableEvaluation, TableMeasure

if TYPE_CHECKING:
    from ...recipes.schema import Recipe

__all__ = [
    "BitsPerDim",
    "Evaluation",
    "EvaluationResult",
    "FlowInput",
    "ImageMeasure",
    "Mean",
    "Measure",
    "NatsPerRow",
    "Quantity",
    "TableEvaluation",
    "TableMeasure",
    "batch_of",
    "measure_of",
]


def measure_of(recipe: Recipe) -> Measure[Any]:
    """What is measured of the data of a recipe."""
    data = recipe.data
    if isinstance(data, TableData):
        return TableMeasure(data.modelled, data.given)
    return ImageMeasure(data.shape, data.levels, flip=data.flip)
