"""A folder that ranks find first on PYTHONPATH: Python imports its sitecustomize before the first line of a program."""
