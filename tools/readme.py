"Render nbs/index.ipynb to README.md: `python tools/readme.py`."
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    "The README's text. Links are relative to nbs/ in the notebook and to the root in the README."
    text, _ = MarkdownExporter().from_filename(str(ROOT/'nbs'/'index.ipynb'))
    text = re.sub(r'\]\((?!https?:|#|\.\./)', '](nbs/', text)
    return text.replace('](../', '](').strip() + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(render(), encoding='utf8')
