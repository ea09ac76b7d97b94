"""The application: experiments from recipes, with data, training, evaluation and reports.

The library does not import it. Its parts build on each other in this order: data, samples, recipes, evaluation,
runs, training and reports, comparison.
"""
