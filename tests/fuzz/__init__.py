"""Fuzzing of everything that reads bytes from outside: the decoder of each image format and both request parsers.

`python -m tests.fuzz --seconds 60` runs every target for that long and prints what it found.

    targets    what is called with each input, and the inputs that mutation begins with
    mutations  changes that keep the structure of a format, so that inputs reach the code behind its parser
    run        one target, in a process of its own, guided by coverage
    corpus/    inputs that were found, and inputs of attacks; a test reads them all
"""
