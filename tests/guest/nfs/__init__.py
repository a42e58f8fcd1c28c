"""A package, and so the scope of conftest.py's guest.

In a folder without this file it would run until the last of all tests, and take a third of a processor from each.
"""
