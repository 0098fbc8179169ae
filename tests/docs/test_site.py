"""The site is built without a warning, and every link, anchor and image of its pages leads somewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.assets, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")} - {None}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") == "stylesheet":
            self.assets.append(attributes["href"])
        elif tag in ("img", "script", "object", "source", "iframe"):
            self.assets += [attributes[key] for key in ("src", "data") if attributes.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_internal_link_leads_to_a_page_and_an_anchor(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links + page.assets:
            if name == "404.html" or urlsplit(link).scheme or link.startswith("data:"):
                continue  # the page of errors has links from the root of the site
            parts = urlsplit(urljoin(f"/{name}", link))
            target = unquote(parts.path).lstrip("/")
            target += "index.html" if target.endswith("/") or not target else ""
            exists = (site / target).is_file()
            if not exists or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                broken.append(f"{name}: {link}")
    assert broken == [], "\n".join(broken)


def test_external_links_are_complete(pages):
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "mailto"), f"{name}: {link}"
                assert "." in parts.netloc, f"{name}: {link}"
                assert " " not in link, f"{name}: {link}"


def test_pages_load_nothing_from_the_network(site, pages):
    assert [f"{name}: {link}" for name, page in pages.items() for link in page.assets if urlsplit(link).netloc] == []


def test_the_site_contains_no_path_of_this_machine(site):
    assert [str(path) for path in site.rglob("*.html") if str(ROOT) in path.read_text()] == []
