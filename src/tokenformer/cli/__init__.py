"""The command line: parse, call one function, print. May import everything.

Modules of commands do without `from __future__ import annotations`: Typer would compile every command's annotations
several times before it answers.
"""
