"""Many trainings: a queue of tasks, the workers that do them, and a fleet of subjects over both.

::

    queue     tasks that wait, run and have ended; no processes
    workers   what a task is given; workers in this process
    cluster   workers that are actors of Ray
    results   the folder, or fsspec URL, that everything is kept in
    records   what a fleet writes of each subject
    subject   one task: a subject is trained, on whatever worker
    run       a fleet, from settings to its page
    page      that page
"""
