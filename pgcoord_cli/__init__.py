"""pgcoord: coordination kept in PostgreSQL, and the operations command for it.

The rooms, from the terminal inwards:

    cli         the command tree; the only place where an error becomes an exit code
    commands/   one file per noun: parse, open, call core, render
    render/     records to table, plain, json, jsonl, csv, markdown
    core/       the four systems: protocols in prose, verbs, frozen records
    db/         connections and named SQL statements; knows nothing of what they mean
    settings    flags, environment and defaults, frozen
    errors      one hierarchy, exit code on the class

Imports run one way, from the top of that list to its bottom.
"""

__version__ = "0.1.0"
