"""Programs that run inside a grading sandbox, on the Python of the tests (3.6 to 3.13), and import nothing of ours.

`rewards.channel` reads them as text. They are written without annotations: `typing` alone would cost every Python
process in there more than all the rest.
"""
