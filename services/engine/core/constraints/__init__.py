"""Completions held to a rule: JSON Schema, regular expression, choice or grammar.

A rule is compiled once (`compilation`), after a process of its own has found it harmless
(`checking`, `checker`). Each sequence then has a matcher, which knows what it has said and says
which tokens may follow (`grammar`); a step applies that as masks (`masks`).
"""
