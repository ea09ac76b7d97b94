"""The application: experiments from recipes, with data, training, evaluation and reports.

The library does not import it. Its rooms build on each other in this order: data, recipes, evaluation, training,
reports, comparison.
"""
