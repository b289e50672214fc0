"""One module per noun of the command line. A command parses its arguments, opens a session, calls core and renders.

No SQL and no logic here. `framework` holds what commands share: global options, lazy groups, parameter types.
"""
