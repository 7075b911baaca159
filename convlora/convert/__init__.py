"""Other libraries' adapters into convlora's and back: PEFT, kohya/LyCORIS, diffusers; loralib's, in.

Lossless where the mathematics allows, refusing with the reason where not. `from_*` attach an adapter to a model and
touch nothing if the file does not fit; `to_*` write files that the other library loads and computes the same with.
"""

from convlora.convert.diffusers import from_diffusers as from_diffusers
from convlora.convert.diffusers import to_diffusers as to_diffusers
from convlora.convert.kohya import from_kohya as from_kohya
from convlora.convert.kohya import to_kohya as to_kohya
from convlora.convert.loralib import from_loralib as from_loralib
from convlora.convert.peft import from_peft as from_peft
from convlora.convert.peft import to_peft as to_peft
from convlora.convert.sniff import sniff as sniff

__all__ = [
    "from_diffusers",
    "from_kohya",
    "from_loralib",
    "from_peft",
    "sniff",
    "to_diffusers",
    "to_kohya",
    "to_peft",
]
