"""Chaos: full load from clients that retry, while workers, files, tokens and certificates fail or change.

`python -m tests.chaos --seconds 600` (make chaos) prints what happened, and ends with exit code 1 if an answer was
wrong, a call was lost or memory grew. The same seed makes the same schedule.

    clients  50 clients that check every answer
    faults   what is done to the server
"""
