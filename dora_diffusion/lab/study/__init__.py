"""A study: methods of training compared over learning rates, subjects and seeds.

::

    config    the study, read from YAML    run     all trials, resumed; rates tuned
    subjects  what is learned, measured    report  means, paired differences, plots, pages
    trials    one training, and its key
"""
