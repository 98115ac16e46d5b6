"""foreshock: which monitor sees a training failure coming first, how surely, and does it name the cause?

Everything is importable under this name: ``foreshock.faults``, ``foreshock.models``, ``foreshock.monitors``,
``foreshock.experiments``, ``foreshock.analysis``. In a clone these are its top-level folders, and ``faults.base`` is
the very module ``foreshock.faults.base``; installed, there is no other name, so that a ``models`` folder of yours
stays yours.
"""

from pathlib import Path

from foreshock._clone import is_clone, one_name

ROOT = Path(__file__).resolve().parent.parent

if is_clone(ROOT):
    __path__.append(str(ROOT))
    one_name()
