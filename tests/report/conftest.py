from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.sources, self.text, self.bold = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())
            if self.open[-1] == "b":
                self.bold.append(data)


@pytest.fixture
def parse():
    """Parses a whole page, or a part of one, and checks that nothing is loaded from elsewhere."""

    def parse(text: str) -> Page:
        assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
        page = Page(text)
        assert all(source.startswith("data:image/") for source in page.sources)
        return page

    return parse
