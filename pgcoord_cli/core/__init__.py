"""The four systems. Ten packages and two modules; imports between them run one way, and import-linter checks it.

What happens is logged through the standard library, under names that begin with `pgcoord.`; docs/logging.md lists them.
"""

import logging

# A library is silent until its program configures logging; without a handler, Python prints warnings to stderr. It is
# added here, not in `pgcoord_cli`: all that logs imports this package, and `import pgcoord_cli` has to stay cheap.
logging.getLogger("pgcoord").addHandler(logging.NullHandler())
