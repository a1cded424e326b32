"""Fleets of trainings: a queue of tasks, the workers that do them, and the subjects over both.

::

    queue       tasks that wait, run and have ended; workers in this process
    connection  a Ray cluster
    cluster     workers that are its actors
    results     records, and the folder, or fsspec URL, that everything is kept in
    subject     one task: a subject, or a pack, is trained on whatever worker
    run         a fleet, from settings to its page
    page        that page
"""
