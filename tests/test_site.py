"""The site as a reader gets it: no page asks another host for anything, every link leads somewhere,
and everybody can read it."""

import io
from pathlib import Path
from urllib.parse import unquote, urldefrag

import matplotlib.pyplot as plt
import pytest

LOOK = '''() => ({
    ids: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    links: [...document.querySelectorAll('a[href]')].map(e => e.href),
    bare: [...document.querySelectorAll('img')]
        .filter(e => !e.alt && e.getAttribute('role') != 'presentation')
        .map(e => e.src.slice(0, 80)),
    headings: [...document.querySelectorAll('main :is(h1, h2, h3, h4, h5, h6)')]
        .map(e => [+e.tagName[1], e.textContent]),
    raw: [...document.querySelectorAll('main p, main li, main td, .math')].flatMap(e => {
        e = e.cloneNode(true); e.querySelectorAll('code').forEach(c => c.remove());
        return e.textContent.match(/\\\\[(\\[]|\\\\(frac|sum|sqrt|text)\\b/g) || [] }),
})'''
WIDTHS = 390, 1280
try:
    import axe_playwright_python
except ImportError:
    AXE = None
else:
    AXE = (Path(axe_playwright_python.__file__).parent / 'axe.min.js').read_text(encoding='utf-8')


def overflow(page):
    "How many pixels the page is wider than the window, and the elements that stick out."
    return page.evaluate('''() => {
        const width = document.documentElement.clientWidth;
        const extra = document.documentElement.scrollWidth - width;
        const wide = e => e.getBoundingClientRect().right > width + 1;
        const out = extra > 0 ? [...document.querySelectorAll('body *')].filter(wide) : [];
        return [extra, out.slice(0, 5).map(e => e.outerHTML.slice(0, 100))];
    }''')


# Contrast is slow to judge, two seconds for a page, and depends on colours, size and what is
# behind: of each combination, three places are enough.
CODE = '''() => {
    const seen = {};
    for (const e of document.querySelectorAll('pre code span')) {
        const kind = e.className + e.getAttribute('style');
        seen[kind] = (seen[kind] || 0) + 1;
        if (seen[kind] > 3) e.replaceWith(...e.childNodes);
    }
}'''
KINDS = '''() => {
    const behind = new Map(), seen = {}, stay = new Set();
    const keep = e => { for (; e && !stay.has(e); e = e.parentElement) stay.add(e) };
    const backdrop = e => {
        if (e && !behind.has(e)) {
            const s = getComputedStyle(e), placed = s.position != 'static';
            const own = [s.backgroundColor, s.backgroundImage, s.opacity, s.filter,
                placed ? e.tagName + e.className : ''].join();
            const bare = own == 'rgba(0, 0, 0, 0),none,1,none,';
            behind.set(e, backdrop(e.parentElement) + (bare ? '' : own + ';'));
        }
        return e ? behind.get(e) : '';
    };
    for (const e of document.querySelectorAll('body *')) {
        if (e.matches('input, textarea, select, button')) keep(e);
        if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
        if (!e.getClientRects().length) continue;
        const s = getComputedStyle(e), link = e.closest('a'), l = link && getComputedStyle(link);
        const parent = link && link.parentElement;
        const around = link ? [parent.tagName, getComputedStyle(parent).color,
            l.textDecorationLine, l.fontWeight, l.borderBottom] : '';
        const look = [s.color, s.fontSize, s.fontWeight, s.textShadow];
        const kind = [...look, around, backdrop(e)].join(' ');
        seen[kind] = (seen[kind] || 0) + 1;
        if (seen[kind] <= 3) keep(e);
    }
    for (const e of document.querySelectorAll('body *'))
        // a row that is not needed stays, but empty, for the stripes of the others
        if (!stay.has(e) && stay.has(e.parentElement))
            e.matches('span') ? e.remove() : e.replaceChildren();
}'''
COLOURS = ['color-contrast', 'link-in-text-block']


def barriers(page):
    """What axe finds on the page that is open: all rules in light mode, those on colours also in
    dark mode."""
    page.set_viewport_size(dict(width=WIDTHS[1], height=900))
    judge = lambda **options: page.evaluate(
        'options => axe.run(document, options)', dict(options, resultTypes=['violations'])
    )['violations']
    found = dict(light=[], dark=[])
    for scheme in found:
        if scheme == 'dark':
            page.emulate_media(color_scheme='dark')
            page.reload()
        page.evaluate(CODE)
        page.evaluate(AXE)
        if scheme == 'light':
            found[scheme] += judge(rules={rule: dict(enabled=False) for rule in COLOURS})
        page.evaluate(KINDS)
        found[scheme] += judge(runOnly=COLOURS)
    page.emulate_media(color_scheme='light')
    return found


@pytest.fixture(scope='module')
def pages(site, docs, browser):
    "What one visit to each page shows: {file: facts}."
    found = {}
    context = browser.new_context()
    page = context.new_page()
    for path in sorted(docs.rglob('*.html')):
        name = path.relative_to(docs).as_posix()
        facts = found[name] = dict(console=[], failed=[], requests=[])
        handlers = {
            'console': lambda m: m.type in ('error', 'warning') and facts['console'].append(m.text),
            'pageerror': lambda e: facts['console'].append(str(e)),
            'request': lambda r: facts['requests'].append(r.url),
            'requestfailed': lambda r: facts['failed'].append(r.url),
            'response': lambda r: r.status >= 400 and facts['failed'].append(r.url),
        }
        for event, handler in handlers.items():
            page.on(event, handler)
        page.set_viewport_size(dict(width=WIDTHS[1], height=900))
        page.goto(
            site + name, wait_until='networkidle' if name.startswith('playground') else 'load'
        )
        facts.update(page.evaluate(LOOK), wide=overflow(page))
        page.set_viewport_size(dict(width=WIDTHS[0], height=800))
        facts['narrow'] = overflow(page)
        for event, handler in handlers.items():
            page.remove_listener(event, handler)
        if AXE:
            facts.update(barriers(page))
    context.close()
    return found


def test_all_chapters_are_there(pages, docs):
    sources = {p.stem for p in (Path(__file__).parents[1] / 'nbs').glob('*.ipynb')}
    assert sources <= {Path(name).stem for name in pages}
    llms = (docs / 'llms.txt').read_text(encoding='utf-8')
    assert not [
        s for s in sources if f'{s}.llms.md' not in llms or not (docs / f'{s}.llms.md').exists()
    ]


def test_no_errors_in_the_console_and_no_failed_requests(pages):
    assert not {
        name: f['console'] + f['failed'] for name, f in pages.items() if f['console'] or f['failed']
    }


def test_nothing_is_fetched_from_another_host(pages, site):
    other = {
        url
        for f in pages.values()
        for url in f['requests']
        if not url.startswith((site, 'data:', 'blob:'))
    }
    assert not other
    assert all(f['requests'] for f in pages.values())


def test_every_internal_link_leads_somewhere(pages, site, docs):
    broken = []
    for name, facts in pages.items():
        for link in set(facts['links']):
            if not link.startswith(site):
                continue
            url, anchor = urldefrag(link)
            target = unquote(url.split('?')[0].removeprefix(site)) or 'index.html'
            if (
                not (docs / target).is_file()
                or anchor
                and target in pages
                and unquote(anchor) not in pages[target]['ids']
            ):
                broken.append(f'{name} -> {target}#{anchor}')
    assert not broken


def test_names_lead_to_their_definitions(pages, site):
    assert site + '01_attention.html#kvcache' in pages['02_model.html']['links']
    assert site + '01_attention.html#causalselfattention' in pages['01_attention.html']['links']


def test_each_chapter_opens_in_colab_and_shows_its_source(pages):
    for name, facts in pages.items():
        if not name[:2].isdigit() and name != 'playground.html':
            continue
        notebook = f'/mingpt-nb/mingpt_nb/blob/main/nbs/{Path(name).stem}.ipynb'
        assert 'https://github.com' + notebook in facts['links'], name
        runs = name not in (
            'playground.html',
            '93_glossary.html',
        )  # no code in view, so nothing to run in Colab
        assert ('https://colab.research.google.com/github' + notebook in facts['links']) == runs, (
            name
        )


def test_every_image_has_alt_text(pages):
    assert not {name: f['bare'] for name, f in pages.items() if f['bare']}


def test_headings_do_not_skip_levels(pages):
    skips = [
        (name, text)
        for name, f in pages.items()
        for (a, _), (b, text) in zip([[0, '']] + f['headings'], f['headings'])
        if b > a + 1
    ]
    assert not skips
    assert not {
        name: f['headings']
        for name, f in pages.items()
        if [level for level, _ in f['headings']].count(1) != 1
    }


def test_formulas_are_mathml(pages, docs):
    assert not {name: f['raw'] for name, f in pages.items() if f['raw']}
    assert '<math' in (docs / '01_attention.html').read_text(encoding='utf-8')


def ink(element):
    "The dark pixels of an element."
    image = plt.imread(io.BytesIO(element.screenshot()))[..., :3]
    return int((image.mean(-1) < 0.5).sum())


def test_roots_are_drawn_on_machines_without_a_font_for_mathematics(pages, site, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900), device_scale_factor=3)
    for name in '01_attention.html', '02_model.html':
        page.goto(site + name)
        page.evaluate('document.fonts.ready')
        assert page.evaluate(
            "getComputedStyle(document.querySelector('math')).fontFamily"
        ).startswith('"Book Math"')
        assert 'loaded' in page.evaluate(
            "[...document.fonts].filter(f => f.family.includes('Book Math')).map(f => f.status)"
        )
        root = page.locator('main msqrt').first
        content = root.locator('xpath=./*').first
        assert ink(root) > 1.3 * ink(content) > 0, name
        assert root.bounding_box()['width'] > content.bounding_box()['width'] + 4, name
    page.close()


@pytest.mark.parametrize('width', ['narrow', 'wide'])
def test_nothing_is_wider_than_the_window(pages, width):
    assert not {name: f[width] for name, f in pages.items() if f[width][0] > 0}


def test_search_finds_a_definition(site, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.goto(site)
    page.get_by_role('searchbox', name='Search').fill('CausalSelfAttention')
    result = page.locator('.smalldocs-search-results a[href*="causalselfattention"]').first
    result.wait_for(timeout=5000)
    result.click()
    page.wait_for_url('**/01_attention.html#causalselfattention*')
    page.close()


@pytest.mark.skipif(not AXE, reason='axe-core is not installed')
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_no_serious_barrier(pages, scheme):
    "All rules in light mode; those that depend on colour in dark mode."
    found = {}
    for name, facts in pages.items():
        for v in facts[scheme]:
            if v['impact'] in ('serious', 'critical'):
                found.setdefault(f"{v['id']}: {v['help']}", []).extend(
                    (name, n['target'], n['failureSummary'][:200]) for n in v['nodes'][:3]
                )
    assert not found
