"""A study: methods of training compared over learning rates, subjects and seeds.

::

    config    the study, read from YAML    run      all trials, resumed; rates tuned
    subjects  what is learned, measured    tables   means, paired differences
    trials    one training, and its key    plots    matplotlib
    perform   trains and measures one      page     report.md and report.html
"""
