"""Fleets: training of many subjects as a queue of tasks for workers.

::

    queue       waiting, running and ended tasks; a worker in this process
    connection  connection to a Ray cluster, and the share of each worker
    cluster     workers that are Ray actors
    results     records, and the folder or fsspec URL of the results
    subject     one task: training of a subject or a pack on a worker
    run         a fleet, from its subjects to its page, and its display
"""
