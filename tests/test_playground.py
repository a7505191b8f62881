"""The playground in a real browser: its JavaScript computes what Python computes, and each part
answers a keyboard and a mouse."""

import functools
import itertools
import random
from pathlib import Path

import pytest
import torch

from mingpt_nb import adder, pixels
from mingpt_nb.bpe import get_encoder, load_tokenizer
from mingpt_nb.model import GPT, filter_logits
from mingpt_nb.words import unicode_ranges

NBS = Path(__file__).parents[1] / 'nbs'
READY = "document.querySelectorAll('[data-ready=true]').length == 4"
load = functools.cache(lambda name: GPT.from_pretrained(NBS / 'playground' / name))


def visit(context, url, wait=READY):
    page = context.new_page()
    page.trouble = []
    page.on('console', lambda m: m.type in ('error', 'warning') and page.trouble.append(m.text))
    page.on('pageerror', lambda e: page.trouble.append(str(e)))
    page.on(
        'request',
        lambda r: (
            r.url.startswith((url.split('playground.html')[0], 'data:'))
            or page.trouble.append(r.url)
        ),
    )
    page.goto(url)
    page.wait_for_function(wait)
    return page


@pytest.fixture(scope='module')
def context(browser):
    with browser.new_context(
        reduced_motion='reduce', viewport=dict(width=1280, height=900)
    ) as context:
        context.set_default_timeout(10_000)
        yield context


@pytest.fixture(scope='module')
def page(context, site):
    """The page, ready; nothing may go wrong in its console, and nothing be asked of another host.
    Each test brings its own input."""
    page = visit(context, site + 'playground.html')
    yield page
    page.close()
    assert not page.trouble


# What it computes

WORDS = (
    "the of don't we'll I'd you're they've I'm it's 'S 's GPT ChatGPT unbelievable naïve Straße "
    "3.14 1,000 x²  ½ Ⅷ foo_bar x+=1; return(a[i]) {} // # \"\"\" <|endoftext|> …"
).split(' ')
SPACES = [
    chr(c)
    for c in (
        9,
        10,
        11,
        12,
        13,
        28,
        29,
        30,
        31,
        32,
        32,
        32,
        0x85,
        0xA0,
        0x1680,
        0x180E,
        0x2003,
        0x2028,
        0x200B,
        0x202F,
        0x205F,
        0x3000,
        0xFEFF,
    )
]
EMOJI = ['🤗', '👩‍🚀', '🇳🇿', '👍🏽', '❤️', '1️⃣', '🏴󠁧󠁢󠁥󠁮󠁧󠁿', '☃']


def strings(n=1000):
    "Random texts of all kinds, the same each time."
    r = random.Random(0)
    edges = [
        chr(c)
        for ends in itertools.chain(*unicode_ranges().values())
        for e in ends
        for c in (e - 1, e, e + 1)
        if not 0xD800 <= c < 0xE000
    ]
    anything = lambda: chr(
        r.randrange(0xD800) if r.random() < 0.5 else r.randrange(0xE000, 0x110000)
    )
    kinds = [
        lambda: r.choice(WORDS),
        lambda: r.choice(SPACES),
        lambda: r.choice(EMOJI),
        lambda: r.choice(edges),
        anything,
        lambda: chr(r.randrange(0x4E00, 0x9FFF)),
        lambda: chr(r.randrange(32, 127)),
        lambda: chr(r.randrange(0x250)),
    ]
    for _ in range(n):
        some = r.sample(kinds, r.randint(1, len(kinds)))
        yield r.choice(['', ' '] * 3 + SPACES).join(
            r.choice(some)() for _ in range(r.randint(0, 40))
        )


def test_ids_are_pythons(page):
    texts, encoder = list(strings()), get_encoder()
    result = page.evaluate(
        '''async texts => {
        const { Encoder } = await import('/playground/bpe.js');
        const e = await Encoder.load('/playground/gpt2-vocab.bpe', '/playground/unicode-16.txt');
        return texts.map(t => [e.encode(t), e.decode(e.encode(t)), e.split_words(t).length]);
    }''',
        texts,
    )
    assert len(set(texts)) > 900
    assert [(t, ids) for t, (ids, _, _) in zip(texts, result)] == [
        (t, encoder.encode(t)) for t in texts
    ]
    assert [back for _, back, _ in result] == texts
    assert [n for *_, n in result] == [
        len(encoder.encode_and_show_work(t)['tokens']) for t in texts
    ]


@pytest.mark.parametrize('name', ['adder', 'chargpt', 'pixels'])
def test_logits_and_attention_are_pythons(page, name):
    model = load(name)
    r, c = random.Random(1), model.config
    prompts = [
        [r.randrange(c.vocab_size) for _ in range(n)]
        for n in [
            1,
            c.block_size,
            c.block_size,
            *(r.randint(1, min(20, c.block_size)) for _ in range(97)),
        ]
    ]
    result = page.evaluate(
        '''async ([name, prompts]) => {
        const { GPT, KVCache } = await import('/playground/gpt.js');
        const model = await GPT.load('/playground/' + name);
        return prompts.map((ids, k) => {
            if (k % 2) return { logits: [...model.forward(ids).logits] };
            const cache = new KVCache(model.config);
            const steps = ids.map(id => model.forward([id], cache));     // one token at a time
            const looks = steps.at(-1).weights.map(heads => heads.map(w => [...w]));
            return { logits: steps.flatMap(s => [...s.logits]), looks };
        });
    }''',
        [name, prompts],
    )
    with torch.no_grad():
        for ids, js in zip(prompts, result):
            idx = torch.tensor([ids])
            torch.testing.assert_close(
                torch.tensor(js['logits']).view(len(ids), -1), model(idx)[0][0], rtol=0, atol=1e-4
            )
            if 'looks' in js:
                torch.testing.assert_close(
                    torch.tensor(js['looks'], dtype=torch.float32),
                    model.attention_weights(idx)[:, 0, :, -1],
                    rtol=0,
                    atol=1e-4,
                )


def test_probabilities_are_pythons(page):
    logits = torch.randn(65, generator=torch.Generator().manual_seed(0)) * 3
    logits[7] = logits[9]  # a draw
    ways = [(t, k) for t in (0.1, 0.8, 1, 2) for k in (0, 1, 2, 10, 65)]
    result = page.evaluate(
        '''async ([logits, ways]) => {
        const { next_probs, draw } = await import('/playground/sample.js');
        const at = [0, .24, .25, .26, .74, .76, .9999999999];
        const drawn = at.map(r => draw([.25, .5, 0, .25], r));
        return [ways.map(([t, k]) => [...next_probs(logits, t, k)]),
                [...next_probs(logits, 0, 0)].indexOf(1), drawn, draw([.5, .4, 0], .95)];
    }''',
        [logits.tolist(), ways],
    )
    for (t, k), probs in zip(ways, result[0]):
        torch.testing.assert_close(
            torch.tensor(probs, dtype=torch.float32),
            filter_logits(logits[None], t, k)[0].softmax(-1),
            rtol=0,
            atol=1e-6,
        )
    assert result[1] == logits.argmax() and result[2] == [0, 0, 1, 1, 1, 3, 3] and result[3] == 1


def test_sums_and_texts_are_pythons(page):
    "Greedy answers, and a text that outgrows the context."
    model = load('adder')
    sums = [divmod(n, 100) for n in random.Random(2).sample(range(10_000), 100)]
    js = page.evaluate(
        '''async sums => {
        const { GPT } = await import('/playground/gpt.js');
        const { add } = await import('/playground/adder.js');
        const model = await GPT.load('/playground/adder');
        return sums.map(([a, b]) => add(model, a, b).answer);
    }''',
        sums,
    )
    assert js == [adder.add(model, a, b) for a, b in sums]
    model, tok = load('chargpt'), load_tokenizer(NBS / 'playground' / 'chargpt')
    js = page.evaluate(
        '''async ids => {
        const { GPT } = await import('/playground/gpt.js');
        const { write } = await import('/playground/writer.js');
        const model = await GPT.load('/playground/chargpt');
        const new_ids = [];
        for (const { id } of write(model, ids, 0, () => ({ temperature: 0, top_k: 0 })))
            if (new_ids.push(id) === 70) return new_ids;
    }''',
        tok.encode('ROMEO:'),
    )
    assert js == model.generate(torch.tensor([tok.encode('ROMEO:')]), 70)[0, 6:].tolist()


def test_the_adder_is_as_good_as_the_page_says(page):
    "All 10,000 sums, in Python; and those that the page calls unseen were."
    model = load('adder')
    x = adder.to_digits(torch.arange(10_000), 4)
    assert (model.generate(x, 3) == adder.with_answers(x)).all()
    offered = page.eval_on_selector_all(
        '[data-pg-sum]', 'all => all.map(e => e.dataset.pgSum.split("+").map(Number))'
    )
    assert offered and {100 * a + b for a, b in offered} <= set(
        adder.split_listed(2, 'test').tolist()
    )


def held_out():
    return pixels.DigitImages(pixels.DigitImages.get_default_config(), 'test')


def test_halves_are_read_and_completed_as_in_python(page):
    "Beliefs after a half; and with temperature 0, where nothing is left to chance, the other half."
    model, test = load('pixels'), held_out()
    halves = test.pixels[:20, :32]
    js = page.evaluate(
        '''async halves => {
        const { GPT } = await import('/playground/gpt.js');
        const { read, believe, go_on } = await import('/playground/pixels.js');
        const model = await GPT.load('/playground/pixels');
        return halves.map((half, i) => {
            const readings = Array.from({ length: 10 }, (_, d) => read(model, d, half));
            const ends = [0, 0].map(() => [...go_on(model, readings[i % 10], 32, () => 0, 0)]);
            return { p: [...believe(readings)], ends };
        });
    }''',
        halves.tolist(),
    )
    p = torch.tensor([row['p'] for row in js], dtype=torch.float32)
    torch.testing.assert_close(p, pixels.recognise(model, halves), rtol=0, atol=1e-4)
    greedy = pixels.go_on(model, torch.arange(20) % 10, halves, temperature=0)[:, 32:].tolist()
    for row, end in zip(js, greedy):
        assert row['ends'] == [end, end]  # the second time with the same keys and values


def test_the_halves_on_offer_were_never_trained_on(page):
    "And the model is as good as the chapter's: it reads nearly all of the pictures held out."
    model, test = load('pixels'), held_out()
    offered = page.eval_on_selector_all('[data-pg-half]', 'all => all.map(e => e.dataset.pgHalf)')
    known = {tuple(row) for row in test.pixels[:, :32].tolist()}
    assert offered and {tuple(int(c, 17) for c in half) for half in offered} <= known
    right = pixels.recognise(model, test.pixels).argmax(1) == test.digits
    assert right.float().mean() > 0.94


# What it does


def test_tokens_by_keyboard_and_mouse(page):
    text, chips, ids = (
        page.get_by_label('Your text'),
        page.get_by_role('option'),
        page.locator('#pg-ids'),
    )
    text.fill('')
    assert (
        ids.inner_text() == '[]' and 'Nothing to merge' in page.locator('#pg-merges').inner_text()
    )
    text.press_sequentially('low lower 🤗')
    assert ids.inner_text() == str(get_encoder().encode('low lower 🤗'))
    assert '11 characters, 14 bytes' in page.locator('#pg-tokens-say').inner_text()
    steps = page.locator('.pg-steps tbody tr')
    chips.nth(1).hover()
    assert steps.last.locator('.pg-piece').all_inner_texts() == ['·lower']
    chips.nth(0).click()
    page.keyboard.press('ArrowRight')
    assert chips.nth(1).get_attribute('aria-selected') == 'true' and chips.nth(1).evaluate(
        'e => e === document.activeElement'
    )
    page.keyboard.press('End')
    assert chips.last.get_attribute('aria-selected') == 'true'
    text.focus()
    page.keyboard.press('Control+Home')
    assert chips.nth(0).get_attribute('aria-selected') == 'true'
    for _ in range(4):
        page.keyboard.press('ArrowRight')  # 'low ', and the cursor stands in the second token
    assert chips.nth(1).get_attribute('aria-selected') == 'true'
    page.get_by_role('button', name='code', exact=True).click()
    assert 'return' in text.input_value() and ids.inner_text() == str(
        get_encoder().encode(text.input_value())
    )


def test_merges_are_those_of_the_word(page):
    page.get_by_label('Your text').fill('unbelievable')
    rows = page.locator('.pg-steps tbody tr')
    shown = [row.locator('.pg-piece').all_inner_texts() for row in rows.all()]
    assert (
        shown[0] == list('unbelievable') and shown[-1] == get_encoder().bpe('unbelievable').split()
    )
    ranks = get_encoder().bpe_ranks
    for before, after, row in zip(shown, shown[1:], rows.all()[1:]):
        rank = int(row.locator('.pg-rank').inner_text().replace(',', ''))
        assert rank == min(ranks.get(pair, 1 << 20) for pair in zip(before, before[1:])) and len(
            after
        ) < len(before)
    page.get_by_label('Your text').fill('lowlands')
    chips = page.get_by_role('option')
    for chip in chips.all():
        chip.hover()
        text = chip.locator('.pg-chip-text').inner_text()
        assert all(''.join(row.locator('.pg-mine').all_inner_texts()) == text for row in rows.all())
    assert chips.count() == 2


def test_a_sum_by_keyboard(page):
    say = page.locator('#pg-sum-say')
    page.mouse.move(0, 0)  # not over something that would answer too
    page.get_by_label('a', exact=True).fill('65')
    page.keyboard.press('Tab')
    page.keyboard.type('36')
    page.keyboard.press('Enter')
    assert page.locator('#pg-row b').all_inner_texts() == list(
        '653610'
    )  # 65 and 36, then 1 and 0 of 101
    page.get_by_role('radio', name='the hundreds').focus()
    assert page.get_by_role('radio', name='the tens').is_checked()
    page.get_by_role('radio', name='the tens').press('ArrowRight')
    assert '101: right' in say.inner_text() and page.locator('#pg-row b').all_inner_texts() == list(
        '6536101'
    )
    assert page.locator('#pg-digits .pg-chosen').inner_text().split()[0] == '1'
    page.locator('.pg-head').nth(4).focus()
    assert page.locator('.pg-weights caption').inner_text().startswith('Layer 1, head 1')
    page.locator('.pg-weights .pg-cell[tabindex="0"]').focus()
    page.keyboard.press('ArrowRight')
    assert (
        'head 1 of layer 1 puts' in page.locator('#pg-cell-say').inner_text()
        and '(a: units)' in page.locator('#pg-cell-say').inner_text()
    )
    page.get_by_label('b', exact=True).fill('x')
    page.keyboard.press('Enter')
    assert (
        'It has learned numbers of two digits, 0 to 99, and no others; not x.' == say.inner_text()
    )


def test_a_sum_by_mouse(page):
    page.get_by_role('button', name='7 + 94').click()
    assert page.locator('#pg-row b').all_inner_texts() == list('079410')
    head = page.locator('.pg-head[aria-pressed=true]')
    page.locator('.pg-head').nth(8).hover()
    assert (
        head.get_attribute('aria-label') == 'layer 2, head 2'
        and page.locator('.pg-line-one').count() > 0
    )
    page.locator('#pg-sum-say').hover()
    assert (
        head.get_attribute('aria-label') != 'layer 2, head 2'
    )  # pointing is looking, a click is choosing
    page.locator('.pg-head').nth(8).click()
    model = load('adder')
    weights = model.attention_weights(torch.tensor([[0, 7, 9, 4, 1]]))[2, 0, 2, 4]
    s, share = weights.argmax().item(), 100 * weights.max().item()
    cell = page.locator(f'.pg-weights [data-t="4"][data-s="{s}"]')
    cell.hover()
    assert abs(float(cell.inner_text()) - share) < 0.51
    assert f'puts {share:.1f} %' in page.locator('#pg-cell-say').inner_text()
    page.get_by_text('the units', exact=True).click()
    assert (
        page.locator('#pg-row b').all_inner_texts() == list('07941')
        and page.locator('#pg-digits li').count() == 10
    )
    page.locator('.pg-link').click()
    assert page.locator('.pg-line-one').count() > 0


def test_it_writes_digit_by_digit_where_motion_is_welcome(browser, site):
    with browser.new_context() as context:
        page = visit(context, site + 'playground.html')
        page.get_by_role('button', name='47 + 54').click()
        for n in 5, 6, 7:
            page.wait_for_function(
                f"document.querySelectorAll('#pg-row b').length == {n}", timeout=5000
            )
        assert '101: right' in page.locator('#pg-sum-say').inner_text()


def test_writing_by_keyboard_and_mouse(page):
    out, go, prompt = (
        page.locator('#pg-out'),
        page.locator('#pg-go'),
        page.get_by_label('Begin with'),
    )
    at_least = lambda n: page.wait_for_function(
        f"document.querySelectorAll('#pg-out [data-n]').length >= {n}"
    )
    texts = []
    for _ in range(2):  # the same seed, the same text
        prompt.fill('JULIET:')
        page.keyboard.press('Enter')
        at_least(30)
        assert go.inner_text() == 'Stop'
        go.click()
        page.wait_for_function("document.getElementById('pg-go').textContent == 'Write'")
        texts.append(out.inner_text()[:37])
    assert texts[0] == texts[1] and texts[0].startswith('JULIET:')
    n = out.locator('[data-n]').count()
    page.wait_for_timeout(100)
    assert (
        out.locator('[data-n]').count() == n
        and f'Stopped after {n} characters' in page.locator('#pg-write-say').inner_text()
    )
    out.locator('[data-n="5"]').hover()
    assert page.locator('#pg-which-value').inner_text().startswith(f'5 of {n}')
    bars = page.locator('#pg-next .pg-bar-value')
    page.get_by_label('Draw from').press('Home')
    assert (
        bars.first.inner_text() == '100.0 %'
        and page.locator('#pg-top-k-value').inner_text() == 'the best 1'
    )
    page.get_by_label('Draw from').press('End')
    loose = bars.first.inner_text()
    writer = page.get_by_role('group', name='Writer')
    writer.get_by_label('Temperature').press('Home')
    assert bars.first.inner_text() == '100.0 %' != loose
    page.get_by_label('Look at character').press('ArrowRight')
    assert page.locator('#pg-which-value').inner_text().startswith(f'6 of {n}')
    page.get_by_label('Seed').fill(
        '7'
    )  # at temperature 0 the seed does not matter: the text is Python's
    go.click()
    at_least(20)
    go.click()
    model, tok = load('chargpt'), load_tokenizer(NBS / 'playground' / 'chargpt')
    assert out.inner_text()[:27] == tok.decode(
        model.generate(torch.tensor([tok.encode('JULIET:')]), 20)[0].tolist()
    )
    page.wait_for_function("document.getElementById('pg-go').textContent == 'Write'")
    prompt.fill('naïve')
    page.keyboard.press('Enter')
    assert (
        page.locator('#pg-write-say').inner_text()
        == 'The model has never seen the character ï; it knows 65 others.'
    )


def drawn_anew(page, act):
    "What the page says of a half, when all its completions of it are there."
    before = page.locator('#pg-more').inner_html()
    act()
    page.wait_for_function(
        """before => { const e = document.getElementById('pg-more');
        const texts = [...e.querySelectorAll('small')].map(s => s.textContent);
        return e.innerHTML != before && texts.length == 4 && texts.every(Boolean)
            && e.querySelectorAll('[aria-label]').length == 4; }""",
        arg=before,
    )
    return page.locator('#pg-pixels-say').inner_text()


def test_a_half_by_mouse(page):
    pad, say = page.locator('#pg-pad'), page.locator('#pg-pixels-say')
    page.get_by_role('button', name='Clear').click()
    assert 'The paper is empty' in say.inner_text() and page.locator('#pg-guess li').count() == 0
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    at = lambda x, y: (box['x'] + box['width'] * x / 8, box['y'] + box['height'] * y / 4)

    def seven():
        page.mouse.move(*at(1.6, 0.6))
        page.mouse.down()
        for place in (5.6, 0.6), (5.4, 1.6), (4.9, 2.6), (4.4, 3.9):
            page.mouse.move(*at(*place), steps=5)
        page.mouse.up()
        page.mouse.move(*at(1, 3.5), steps=3)  # without the button it draws nothing

    assert 'It takes this for a ' in drawn_anew(page, seven)
    greys = pad.locator('button').evaluate_all(
        'all => all.map(e => e.style.getPropertyValue("--g"))'
    )
    greys = [int(grey) for grey in greys]
    assert greys[3] > 12 and greys[24] == 0 and sum(greys[:8]) > sum(greys[8:16])
    p = pixels.recognise(load('pixels'), [greys])[0]
    for digit, bar in enumerate(page.locator('#pg-guess .pg-bar').all()):
        assert float(bar.evaluate('e => e.style.getPropertyValue("--p")')) == pytest.approx(
            p[digit].item(), abs=1e-3
        )
    assert f'takes this for a{"n" * (p.argmax() == 8)} {p.argmax()} ' in say.inner_text()
    first = page.locator('#pg-more').inner_html()
    drawn_anew(page, page.get_by_role('button', name='Another lower half').click)
    assert page.locator('#pg-more').inner_html() != first


def test_a_half_by_keyboard(page):
    page.get_by_role('button', name='Clear').click()
    cells = page.locator('#pg-pad button')
    cells.nth(0).focus()
    page.keyboard.press('ArrowRight')
    page.keyboard.press('ArrowDown')
    assert cells.nth(9).evaluate('e => e === document.activeElement')
    for grey in 16, 8, 0, 16:
        page.keyboard.press('Space')
        assert cells.nth(9).get_attribute('aria-label') == f'row 2, column 2: {grey} of 16'
    page.keyboard.press('ArrowRight')
    assert 'It takes this for' in drawn_anew(page, lambda: page.keyboard.press('Enter'))
    assert cells.nth(10).get_attribute('aria-label') == 'row 2, column 3: 16 of 16'
    assert page.locator('#pg-rest > *').count() == 32
    page.get_by_role('button', name='a five').focus()
    drawn_anew(page, lambda: page.keyboard.press('Enter'))
    assert 'It takes this for a 5' in page.locator('#pg-pixels-say').inner_text()
    page.locator('#pg-heat').focus()
    drawn_anew(page, lambda: page.keyboard.press('Home'))
    assert page.locator('#pg-heat-value').inner_text() == '0.00'


def test_a_half_by_finger(browser, site):
    with browser.new_context(has_touch=True, viewport=dict(width=390, height=800)) as context:
        page = visit(context, site + 'playground.html')
        page.get_by_role('button', name='Clear').click()
        pad = page.locator('#pg-pad')
        pad.scroll_into_view_if_needed()
        box = pad.bounding_box()
        where = box['x'] + box['width'] * 0.44, box['y'] + box['height'] * 0.3
        drawn_anew(page, lambda: page.touchscreen.tap(*where))
        label = pad.locator('button').nth(11).get_attribute('aria-label')
        assert int(label.split()[-3]) > 4
        assert pad.evaluate('e => getComputedStyle(e).touchAction') == 'none'


# What it looks like where things are missing


def test_the_example_on_the_page_is_what_the_programs_make(browser, site, context):
    page = visit(context, site + 'playground.html')
    with browser.new_context(java_script_enabled=False) as context:
        bare = context.new_page()
        bare.goto(site + 'playground.html')
        for name in (
            'tokens-say',
            'chips',
            'ids',
            'merges',
            'row',
            'sum-say',
            'digits',
            'sum-why',
            'out',
            'next',
            'pixels-say',
            'guess',
            'more',
        ):
            text = bare.locator(f'#pg-{name}').inner_text()
            assert text and text == page.locator(f'#pg-{name}').inner_text(), name
        assert (
            bare.locator('#pg-paper svg text').all_inner_texts()
            == page.locator('#pg-paper svg text').all_inner_texts()
            != []
        )
        assert 'The page needs JavaScript' in bare.content()
        example = bare.locator('#pg-out').inner_text()
    made = page.evaluate(
        '''async n => {
        const { GPT } = await import('/playground/gpt.js');
        const { write, CharTokenizer } = await import('/playground/writer.js');
        const model = await GPT.load('/playground/chargpt'), ids = [];
        const vocab = await fetch('/playground/chargpt/vocab.json');
        const tok = new CharTokenizer(await vocab.json());
        const seed = Number(document.getElementById('pg-seed').value);
        const how = () => ({ temperature: 0.8, top_k: 0 });
        for (const { id } of write(model, tok.encode('ROMEO:'), seed, how))
            if (ids.push(id) === n) return tok.decode(ids);
    }''',
        80,
    )
    assert example.startswith('ROMEO:' + made)


def test_a_missing_file_is_said_and_the_rest_works(browser, site):
    with browser.new_context() as context:
        page = context.new_page()
        page.route('**/adder/model.safetensors', lambda route: route.fulfill(status=404))
        page.goto(site + 'playground.html')
        page.wait_for_function("document.querySelectorAll('[data-ready]').length == 4")
        message = page.locator('#pg-adder .pg-error').inner_text()
        assert 'could not start' in message and 'adder/model.safetensors: 404' in message
        assert (
            page.locator('[data-ready=true]').count() == 3
            and page.locator('.pg-error').count() == 1
        )
        assert (
            page.locator('#pg-paper svg').is_visible()
            and page.get_by_label('a', exact=True).is_disabled()
        )


def test_opened_as_a_file_it_says_what_to_do(browser, docs):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto((docs / 'playground.html').as_uri())
        assert (
            'python -m http.server' in page.locator('#pg-file').inner_text()
            and page.locator('#pg-chips .pg-chip').first.is_visible()
        )


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_it_fits_a_phone_and_axe_finds_nothing(browser, site, scheme):
    axe = pytest.importorskip('axe_playwright_python', reason='axe-core is not installed')
    with browser.new_context(
        color_scheme=scheme, reduced_motion='reduce', viewport=dict(width=390, height=800)
    ) as context:
        page = visit(context, site + 'playground.html')
        assert page.evaluate(
            'document.documentElement.scrollWidth <= document.documentElement.clientWidth'
        )
        page.locator('.pg-head').nth(3).click()
        page.evaluate((Path(axe.__file__).parent / 'axe.min.js').read_text(encoding='utf-8'))
        for v in page.evaluate("axe.run('main')")['violations']:
            assert not v['nodes'], (
                v['id'],
                v['help'],
                [(n['target'], n['failureSummary'][:300]) for n in v['nodes'][:3]],
            )


def test_the_files_are_small():
    size = lambda name: sum(f.stat().st_size for f in (NBS / 'playground' / name).iterdir())
    assert size('adder') < 400_000 and size('chargpt') < 1_700_000 and size('pixels') < 600_000
    assert sum(f.stat().st_size for f in (NBS / 'playground').glob('*.*')) < 100_000
