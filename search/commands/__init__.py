"""The commands of `bitplan` besides `search`, a module each: its help, its arguments, and what it does.

Modules import what is heavy inside `run`, so that `bitplan --help` answers at once.
"""
