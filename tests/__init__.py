"""Tests. Shapes and types of the package are checked at run time while they run."""

import beartype

# As PEP 484 has it, an int will do where a float is asked for.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
