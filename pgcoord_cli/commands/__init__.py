"""One file per noun: parse, open, call core, render. No SQL and no logic here.

`framework` holds what every command shares: the global options, lazy groups and the parsed parameter types.
"""
