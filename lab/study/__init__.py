"""Studies: comparisons of training methods over learning rates, subjects and seeds.

::

    config    the study, read from YAML        run     trials, resuming, tuning of rates
    subjects  photos and measures of subjects  report  means, paired differences, plots, pages
    trials    one training, and its key
"""
