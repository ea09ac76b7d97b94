"""The application: experiments from recipes, with data, training, evaluation and reports.

The library does not import it. Its rooms build on each other in this order:

1. ``data``: data sets of images and tables, and their identity;
2. ``samples``: draws from a flow;
3. ``recipes``: all settings of a run, and trained weights;
4. ``evaluation``: what is measured of a model, and whether it can be trusted;
5. ``runs``: the folder of a run;
6. ``quantities``: name, meaning and form of each number of a run;
7. ``training``: ``fit`` and its checkpoints, and beside it ``reports``: the page of several runs;
8. ``comparison``: the runs of several configurations.
"""
