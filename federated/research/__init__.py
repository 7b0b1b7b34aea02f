"""What a researcher works with in a notebook, before and after a study.

Before: declare a question, try it out on public people, choose clip, rate and rounds, see what it
costs, write the file that `havengate study plan` takes. After: read a release. Between the two
stand other people, and commands (`docs/studies.md`): nothing here asks anybody anything.

Each function is thin over `federated.questions`, `simulation`, `planning`, `draft` and `release`.
Only `people_of` and `read_release` read files; nothing is written.
"""

from federated.research.models import Model
from federated.research.releases import Release, read_release
from federated.research.show import Table
from federated.research.studies import Asked, Plan, declared, draft_of, plan
from federated.research.tables import people_of
from federated.research.trials import Choices, Tried, choose, try_out

__all__ = [
    "Asked",
    "Choices",
    "Model",
    "Plan",
    "Release",
    "Table",
    "Tried",
    "choose",
    "declared",
    "draft_of",
    "people_of",
    "plan",
    "read_release",
    "try_out",
]
