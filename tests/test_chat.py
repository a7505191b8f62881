"""Conversations: the same ids as transformers' templates, what a turn costs, what Ctrl-C leaves,
and `mingpt-nb chat` in a terminal."""

import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

os.environ['HF_HUB_OFFLINE'] = '1'

from mingpt_nb import chat, llama
from mingpt_nb.chat import CHATML, ChatDataset, Conversation, chat_tokenizer, render
from mingpt_nb.data import smollm2
from mingpt_nb.model import GPT
from mingpt_nb.utils import CfgNode, cli
from mingpt_nb.weights import GGUF, gguf_tokenizer

WORDS = (
    'the sun rises in Ålesund at 5:47, 早安! 🤗 don\'t  print("x")\n\n naïve 1234567 <b> {{ x }} {%'
)
WORDS = WORDS.split(' ')
MARKS = '<|im_start|>', '<|im_end|>', '<|endoftext|>', '<|im_start|>system\n', '<|im_end', '|>'


def said(rng, special=False):
    "Some words, sometimes none, sometimes with spaces around, or with special tokens."
    words = [rng.choice(WORDS) for _ in range(rng.choice([0, 1, 3, 9, 20]))]
    if special:
        for _ in range(rng.randint(0, 3)):
            words.insert(rng.randint(0, len(words)), rng.choice(MARKS))
    around = [rng.choice(['', '', '', ' ', '\n', '\n\n', '  ']) for _ in range(2)]
    return around[0] + rng.choice([' ', ' ', '']).join(words) + around[1]


def conversation(rng, special=False):
    messages = [dict(role='system', content=said(rng, special))] * (rng.random() < 0.5)
    for _ in range(rng.randint(1, 4)):
        messages.append(dict(role='user', content=said(rng, special)))
        if rng.random() < 0.2:
            messages.append(dict(role='assistant', content='<tool>add 1 2</tool>'))
            messages.append(dict(role='tool', content=said(rng, special)))
        messages.append(dict(role='assistant', content=said(rng, special)))
    return messages[: -1 if rng.random() < 0.2 else None]


@pytest.fixture(scope='session')
def smol(tmp_path_factory):
    "SmolLM2's tokenizer, ours and transformers' reading what ours has saved."
    transformers = pytest.importorskip('transformers')
    path = smollm2()
    if path is None:
        pytest.skip('SmolLM2 is not in the cache: make weights')
    ours, folder = gguf_tokenizer(GGUF(path).meta), tmp_path_factory.mktemp('smol')
    ours.save(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def made_here(tmp_path_factory):
    "A small tokenizer with ChatML, and transformers' reading of it."
    transformers = pytest.importorskip('transformers')
    talk = [dict(role='user', content=' '.join(WORDS))]
    ours, folder = chat_tokenizer([talk], 40), tmp_path_factory.mktemp('small')
    ours.save(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    return made_here(tmp_path_factory)


def apply(theirs, messages, answer=False):
    kwargs = dict(add_generation_prompt=answer)
    text = theirs.apply_chat_template(messages, tokenize=False, **kwargs)
    return text, theirs.apply_chat_template(messages, return_dict=False, **kwargs)


@pytest.mark.parametrize('which', ['smol', 'small'])
def test_200_conversations_are_rendered_as_by_transformers(which, request):
    ours, theirs = request.getfixturevalue(which)
    rng, turns = random.Random(1), 0
    for _ in range(200):
        messages, answer = conversation(rng), rng.random() < 0.5
        missing = set(''.join(m['content'] for m in messages).encode()) & set(ours.missing)
        assert not missing
        ids, mask = render(messages, ours, answer=answer)
        text, want = apply(theirs, messages, answer)
        assert ids == want, messages
        assert ours.decode(ids) == text and len(mask) == len(ids)
        turns += len(messages)
    assert turns > 800


@pytest.mark.parametrize('which', ['smol', 'small'])
def test_special_tokens_in_what_is_said_stay_text(which, request):
    """The text is that of transformers; the ids are those of its tokenizer when it is told to split
    special tokens, between the marks that the template has put there."""
    ours, theirs = request.getfixturevalue(which)
    rng, seen = random.Random(2), 0
    start, end = (ours.special_tokens[m] for m in MARKS[:2])
    for _ in range(200):
        messages, answer = conversation(rng, special=True), rng.random() < 0.5
        ids, _ = render(messages, ours, answer=answer)
        text, _ = apply(theirs, messages, answer)
        assert ours.decode(ids) == text
        heard = messages
        if which == 'smol' and messages[0]['role'] != 'system':
            heard = [dict(role='system', content=None), *messages]
        assert ids.count(end) == len(heard) and ids.count(start) == len(heard) + answer
        want = []
        for m in heard:
            content = m['content']
            if content is None:
                content = text[text.index('\n') + 1 : text.index(MARKS[1])]
            part = f'{m["role"]}\n{content}'
            plain = theirs.encode(part, add_special_tokens=False, split_special_tokens=True)
            line = theirs.encode('\n', add_special_tokens=False)
            want += [start, *plain, end, *line]
        if answer:
            want += [start, *theirs.encode('assistant\n', add_special_tokens=False)]
        assert ids == want
        seen += any(mark in m['content'] for m in messages for mark in MARKS[:3])
    assert seen > 100


def test_the_mask_is_on_what_the_assistant_says_and_on_its_end(smol):
    ours, _ = smol
    rng = random.Random(3)
    for _ in range(100):
        messages = conversation(rng, special=True)
        ids, mask = render(messages, ours)
        runs, before = [], False
        for i, learnt in zip(ids, mask):
            if learnt and not before:
                runs.append([])
            if learnt:
                runs[-1].append(i)
            before = learnt
        answers = [m['content'] for m in messages if m['role'] == 'assistant']
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers):
            assert run[-1] == 2 and 2 not in run[:-1]
            # where an answer begins with new lines, they may be one token with the template's own
            assert ours.decode(run[:-1]).lstrip('\n') == answer.lstrip('\n')


LLAMA3 = """{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' }}\
{{ m.content | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"""
MARKED = """{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        [A]{% generation %}{{ m.content }}<|eot|>{% endgeneration %}
    {%- else -%}
        [U]{{ m.content }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[A]{%- endif -%}"""


@pytest.mark.parametrize('template', [LLAMA3, MARKED, CHATML])
def test_other_templates(template, tmp_path):
    transformers = pytest.importorskip('transformers')
    marks = '<|start|>', '<|stop|>', '<|eot|>', '<|im_start|>', '<|im_end|>'
    plain = chat_tokenizer([[dict(role='user', content=' '.join(WORDS))]], 30)
    table = dict(plain.encoder)
    for mark in marks:
        table.setdefault(mark, len(table))
    ours = type(plain)(
        table,
        list(plain.bpe_ranks),
        'smollm',
        special=marks,
        bos_id=table['<|start|>'],
        eos_id=table['<|eot|>'],
        chat_template=template,
    )
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(4)
    for _ in range(60):
        messages, answer = conversation(rng), rng.random() < 0.5
        ids, mask = render(messages, ours, answer=answer)
        text, want = apply(theirs, messages, answer)
        assert ids == want and ours.decode(ids) == text
        assert any(mask) == any(m['role'] == 'assistant' for m in messages)
        if template == MARKED:
            found = theirs.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = render(messages, ours)
            straddles = any(m['content'][:1].isspace() for m in messages)
            assert straddles or mask == [bool(i) for i in found['assistant_masks']]


@pytest.mark.parametrize(
    'messages, says',
    [
        ('hello', 'a conversation is a list of messages'),
        ([], "no message is the user's"),
        ([dict(role='system', content='x')], "no message is the user's"),
        ([dict(role='robot', content='x')], "message 0: no role 'robot'; there are: system, user"),
        ([dict(role='user', content=None)], 'message 0: its content should be a text, got None'),
        ([dict(role='user', content=['x'])], 'its content should be a text'),
        ([dict(role='user')], 'message 0 should have role and content'),
        ([dict(role='user', content='\ud800')], 'surrogate'),
    ],
)
def test_messages_that_are_none(messages, says, small):
    with pytest.raises(ValueError, match=says) as e:
        render(messages, small[0])
    assert '\n' not in str(e.value)


def test_no_template_and_broken_ones(small):
    from mingpt_nb.bpe import get_encoder

    hello = [dict(role='user', content='hello')]
    with pytest.raises(ValueError, match='has no chat template'):
        render(hello, get_encoder())
    for template, says in {
        '{% for %}': 'cannot be read',
        '{{ raise_exception("no") }}': 'does not take these messages: no',
        '{{ messages.nobody.nothing }}': 'does not take these messages',
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": 'does not take these messages',
    }.items():
        with pytest.raises(ValueError, match=says):
            render(hello, small[0], template)
    both = [*hello, dict(role='assistant', content='x')]
    last = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ValueError, match='puts no answer at this place'):
        render(both, small[0], last)


# Talking


def model_for(tokenizer, kind='gpt', context=256, seed=0):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=context)
    sizes['vocab_size'] = max(tokenizer.decoder) + 1
    if kind == 'gpt':
        return GPT(CfgNode(**vars(GPT.get_default_config()) | sizes | dict(model_type=None))).eval()
    config = llama.Llama.get_default_config()
    config.merge_from_dict(sizes)
    return llama.Llama(config).eval()


def counted(model):
    "A list to which each pass adds how many tokens it has read."
    passes, table = [], getattr(model, 'transformer', getattr(model, 'model', None))
    table = table['wte' if 'wte' in table else 'embed_tokens']
    table.register_forward_hook(lambda layer, args, out: passes.append(args[0].numel()))
    return passes


@pytest.mark.parametrize('kind', ['gpt', 'llama'])
def test_a_turn_costs_its_own_tokens(small, kind):
    "Each token of a conversation is read once, the last one of an answer with the next turn."
    model = model_for(small[0], kind)
    passes, read = counted(model), 0
    talk = Conversation(model, small[0], max_new_tokens=7, temperature=0)
    for text in 'the sun', 'rises', '', 'in Ålesund', 'at 5:47':
        before = len(talk.ids)
        list(talk.say(text))
        written = len(passes)
        assert passes[0] > 1 and set(passes[1:]) <= {1} and written <= 7
        read += sum(passes)
        # what a limit cuts off leaves two tokens unread: the last one, and the end that is added
        assert read == talk.caches[0].length and len(talk.ids) - read in (1, 2)
        assert sum(passes) <= len(talk.ids) - before + 1
        passes.clear()
    assert read > 100


@pytest.mark.parametrize('kind', ['gpt', 'llama'])
def test_a_kept_cache_changes_no_answer(small, kind):
    "Greedy answers are those of `generate` that reads the whole conversation each time."
    model, tokenizer = model_for(small[0], kind), small[0]
    talk = Conversation(model, tokenizer, max_new_tokens=9, temperature=0)
    for text in 'the sun', 'rises in the', 'naïve':
        talk.listen(text)
        asked = list(talk.ids)
        list(talk.answer())
        special = tokenizer.special_tokens['<|im_start|>']
        allowed = set(tokenizer.decoder) - {special}
        want = model.generate([asked], 9, stop_tokens=talk.end, allowed=allowed)[0].tolist()
        assert talk.ids[: len(want)] == want
        assert talk.ids[-1] == talk.end


def text_of(talk):
    return talk.tokenizer.decode(talk.ids)


@pytest.mark.parametrize('n', [0, 1, 4])
@pytest.mark.parametrize('how', ['closed', 'inside'])
def test_an_answer_that_is_cut_off_ends_there(small, how, n):
    """Whoever stops reading, or presses Ctrl-C, between tokens or in the middle of a pass, leaves a
    conversation that goes on as one in which the answer had been that short."""
    model, tokenizer = model_for(small[0], 'llama'), small[0]
    how_long = dict(max_new_tokens=12, temperature=0)
    talk = Conversation(model, tokenizer, **how_long)
    list(talk.say('the sun'))
    if how == 'inside':  # after the first layer's cache has grown
        calls, layer = [], model.model.layers[1]

        def press(*args):
            calls.append(1)
            if len(calls) > n:
                raise KeyboardInterrupt

        hook = layer.register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt):
            list(talk.say('rises'))
        hook.remove()
    else:
        talk.listen('rises')
        with contextlib.closing(talk.answer()) as answer:
            for _ in range(n):
                next(answer, None)
    assert len({cache.length for cache in talk.caches}) == 1
    begun = how == 'inside' or n > 0
    assert (talk.messages[-1]['role'] == 'assistant') == begun == (talk.ids[-1] == talk.end)
    again = Conversation(model, tokenizer, **how_long)
    again.messages, again.ids, again.closed = list(talk.messages), list(talk.ids), talk.closed
    assert ''.join(talk.say('at 5:47')) == ''.join(again.say('at 5:47'))
    assert talk.ids == again.ids and talk.messages == again.messages


class Parrot:
    "A model that says what it is told to, token after token."

    def __init__(self, tokenizer, ids, context=512):
        self.ids, self.block_size = list(ids), context
        self.config = CfgNode(vocab_size=max(tokenizer.decoder) + 1)
        self.lm_head = torch.nn.Linear(1, 1)

    def new_caches(self, batch, n):
        return [CfgNode(length=0)]

    def next_logits(self, idx, caches):
        caches[0].length = idx.size(1)
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.ids.pop(0)] = 1
        return logits


def test_no_character_is_ever_cut(small):
    tokenizer, said = small[0], 'Grüße 🤗 早安'
    ids = [tokenizer.byte_ids[b] for b in said.encode()]
    whole = Conversation(Parrot(tokenizer, [*ids, tokenizer.eos_id]), tokenizer, temperature=0)
    found = list(whole.say('hello'))
    assert ''.join(found) == said and found[2] == 'ü' and all(found)
    for n in range(len(ids) + 1):  # cut by the limit
        talk = Conversation(Parrot(tokenizer, ids), tokenizer, temperature=0, max_new_tokens=n)
        found = ''.join(talk.say('hello'))
        assert found == said.encode()[:n].decode(errors='ignore')
        assert talk.messages[-1]['content'] == found


def test_special_tokens_are_not_said(small):
    tokenizer = small[0]
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.special_tokens['<|im_start|>']] *= 1000
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        talk = Conversation(model, tokenizer, max_new_tokens=20, generator=g)
        list(talk.say('hello'))
        assert talk.ids.count(tokenizer.special_tokens['<|im_start|>']) == 2


def test_a_full_context_loses_its_oldest_turns_and_says_so(small, capsys):
    tokenizer = small[0]
    model = model_for(tokenizer, 'llama', context=128)
    talk = Conversation(model, tokenizer, system='the sun', max_new_tokens=8, temperature=0)
    for n in range(30):
        chat.show(talk, f'the sun rises {n}')
        assert len(talk.ids) <= 128
        assert talk.messages[0] == dict(role='system', content='the sun')
        assert talk.messages[1]['role'] == 'user'
        assert talk.messages[-2] == dict(role='user', content=f'the sun rises {n}')
    assert talk.forgotten > 10 and talk.forgotten % 2 == 0
    said = capsys.readouterr().out
    dropped = sum(map(int, re.findall(r'the (\d+) oldest messages', said)))
    assert dropped == talk.forgotten
    before = list(talk.messages), list(talk.ids)
    with pytest.raises(ValueError, match='this takes [0-9]+ tokens, and the context of 128 has'):
        talk.listen('sun ' * 200)
    assert (talk.messages, talk.ids) == before
    chat.show(talk, 'sun ' * 200)
    assert '[this takes' in capsys.readouterr().out


def test_seeds(small):
    model = model_for(small[0])

    def talk(seed):
        g = torch.Generator().manual_seed(seed)
        t = Conversation(model, small[0], max_new_tokens=20, generator=g)
        return [''.join(t.say(x)) for x in ('a', 'b')]

    assert talk(1) == talk(1) != talk(2)


# Data


def test_datasets_learn_answers_and_their_end_only(small):
    tokenizer, rng = small[0], random.Random(5)
    conversations = [conversation(rng, special=True) for _ in range(40)]
    conversations = [c for c in conversations if any(m['role'] == 'assistant' for m in c)]
    data = ChatDataset(conversations, tokenizer)
    for k, messages in enumerate(conversations):
        ids, mask = render(messages, tokenizer)
        x, y = data[k]
        n = len(ids) - 1
        assert len(x) == len(y) == data.get_block_size() and x[:n].tolist() == ids[:-1]
        assert [(i if m else -1) for i, m in zip(ids[1:], mask[1:])] == y[:n].tolist()
        assert (y[n:] == -1).all()
        answers = sum(m['role'] == 'assistant' for m in messages)
        assert (y == tokenizer.eos_id).sum() == answers and tokenizer.pad_id == tokenizer.eos_id
    x, y = data.__getitems__(range(len(data)))
    assert torch.equal(x, torch.stack([data[i][0] for i in range(len(data))]))
    with pytest.raises(ValueError, match='conversation 1 takes [0-9]+ tokens'):
        ChatDataset(
            [
                [dict(role='user', content=''), dict(role='assistant', content='x' * n)]
                for n in (1, 99)
            ],
            tokenizer,
            block_size=40,
        )
    with pytest.raises(ValueError, match='conversation 0 has no answer'):
        ChatDataset([[dict(role='user', content='x')]], tokenizer)


# The command


@pytest.fixture(scope='session')
def folder(small, tmp_path_factory):
    "A saved model that cannot say anything sensible, but can be talked with."
    place = tmp_path_factory.mktemp('model')
    model_for(small[0], 'llama').save_pretrained(place, small[0])
    return place


@pytest.fixture(scope='module')
def endless(small, tmp_path_factory):
    "Another one, which writes until it is stopped: the token that ends an answer is never drawn."
    model = model_for(small[0], 'llama', context=50_000)
    for p in model.parameters():
        p.data.zero_()
    model.model.embed_tokens.weight.data.fill_(1)
    model.model.norm.weight.data.fill_(1)  # so each place has the same vector, of ones
    end = small[0].special_tokens['<|im_end|>']
    model.lm_head.weight.data[end] = -10
    place = tmp_path_factory.mktemp('endless')
    model.save_pretrained(place, small[0])
    return place


ENV = os.environ | dict(OMP_NUM_THREADS='1', PYTHONIOENCODING='utf-8', HF_HUB_OFFLINE='1')
COMMAND = [sys.executable, '-c', 'from mingpt_nb.utils import cli; cli()', 'chat']


def talked(folder, lines, *args):
    done = subprocess.run(
        [*COMMAND, f'--model={folder}', '--device=cpu', '--seed=1', '--max_new_tokens=5', *args],
        input=lines.encode(),
        capture_output=True,
        env=ENV,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command_line_by_line(folder, tmp_path):
    file = tmp_path / 'talk.json'
    lines = f"""hello
/save {file}
/system Be brief.
Grüße
/save {file}
/save {tmp_path / 'no' / 'where'}
/nothing
/reset
/save {file}
/quit
never read
"""
    code, out, err = talked(folder, lines)
    assert (code, err) == (0, '')
    assert out.count('[a new conversation]') == 2 and out.count(f'messages in {file}') == 3
    assert 'cannot write' in out and '/reset          begin anew' in out
    assert json.loads(file.read_text(encoding='utf-8')) == [
        dict(role='system', content='Be brief.')
    ]
    again = talked(folder, lines)[1]
    assert again == out  # the seed
    code, out, err = talked(folder, '', 'Grüße', 'an alle')
    assert code == 0 and out.endswith('\n')


def test_a_whole_conversation_is_saved(folder, tmp_path):
    file = tmp_path / 'talk.json'
    talked(folder, f'one\ntwo ü\n/save {file}\n', '--system=Listen.')
    messages = json.loads(file.read_text(encoding='utf-8'))
    assert [m['role'] for m in messages] == ['system'] + ['user', 'assistant'] * 2
    assert [m['content'] for m in messages[:2]] == ['Listen.', 'one']
    assert messages[3]['content'] == 'two ü'


@pytest.mark.parametrize(
    'args, says',
    [
        (['--temperature=-1'], 'temperature must be 0'),
        (['--top_p=2'], 'top_p must be above 0'),
        (['--max_new_tokens=-1'], 'max_new_tokens must not be negative'),
        (['--context=1000000'], 'context must be'),
        (['--context=2'], 'context must be'),
        (['--seed=x'], "expected int or None, got 'x'"),
        (['--modle=x'], 'modle'),
        (['--model=nowhere'], 'nowhere'),
        (['--bits=3'], 'bits must be'),
    ],
)
def test_settings_that_cannot_be(folder, args, says):
    refused([f'--model={folder}', '--device=cpu', *args], says)


def refused(args, says):
    "The command ends with one line that says this."
    with pytest.raises(SystemExit) as e:
        cli(['chat', *args])
    assert e.value.code.startswith('mingpt-nb chat: ') and '\n' not in e.value.code
    assert says in e.value.code


def test_a_model_that_cannot_chat(tmp_path):
    from mingpt_nb.bpe import CharTokenizer

    letters = CharTokenizer.from_text('abc')
    c = GPT.get_default_config()
    c.merge_from_dict(dict(model_type='gpt-nano', vocab_size=3, block_size=8))
    GPT(c).save_pretrained(tmp_path, letters)
    refused([f'--model={tmp_path}'], 'has no chat template')


def test_without_weights_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('MINGPT_NB_CACHE', str(tmp_path))
    refused([], 'there is no model yet: run mingpt-nb weights once, or give --model=FOLDER')


@pytest.mark.skipif(os.name == 'nt', reason='a terminal of its own')
def test_in_a_terminal_ctrl_c_ends_the_answer(endless):
    """The process has a terminal; Ctrl-C comes while it writes. It says so and takes the next line;
    Ctrl-C at the prompt ends nothing either; Ctrl-D does."""
    import pty

    pid, fd = pty.fork()
    if pid == 0:
        args = [f'--model={endless}', '--device=cpu', '--seed=1', '--max_new_tokens=100000']
        os.execvpe(COMMAND[0], [*COMMAND, *args, '--temperature=1', '--system=x'], ENV)
    seen, at = b'', 0

    def comes(what, limit):
        nonlocal seen, at
        ends = time.monotonic() + limit
        while what not in seen[at:]:
            if not select.select([fd], [], [], max(0, ends - time.monotonic()))[0]:
                return False
            seen += os.read(fd, 4096)
        at = seen.index(what, at) + len(what)
        return True

    def until(what):
        assert comes(what, 120), seen.decode(errors='replace')

    try:
        until(b'> ')
        os.write(fd, 'Grüße\n'.encode())
        until('Grüße\r\n'.encode())
        time.sleep(0.5)  # it writes
        os.write(fd, b'\x03')
        until(b' [stopped]\r\n> ')
        for _ in range(30):  # Python keeps one that comes just before it waits for the next one
            os.write(fd, b'\x03')
            if comes(b'/quit or Ctrl-D ends', 3):
                break
        else:
            raise AssertionError(seen.decode(errors='replace'))
        os.write(fd, b'/help\n')
        until(b'/save FILE')
        until(b'> ')
        os.write(fd, b'\x04')
        _, status = os.waitpid(pid, 0)
        pid = None
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


def test_the_recorded_run_can_be_made_again(tmp_path):
    "The benchmark runs in its smallest sizes, and the run beside the chapter has the same rows."
    root = Path(__file__).parents[1]
    command = [sys.executable, '-W', 'ignore', root / 'benchmarks/chat.py', '--tiny', '--json']
    subprocess.run([*command, tmp_path / 'rows.json'], check=True, capture_output=True, env=ENV)
    made = json.loads((tmp_path / 'rows.json').read_text(encoding='utf-8'))['rows']
    assert [row['what'] for row in made] == ['data', 'before', 'training', 'after']
    for path in (root / 'benchmarks/results').glob('chat-*.json'):
        kept = json.loads(path.read_text(encoding='utf-8'))['rows']
        assert [row.keys() for row in kept] == [row.keys() for row in made]
        assert (
            kept[3]['right'] > kept[1]['right'] and kept[1]['said'].keys() == kept[3]['said'].keys()
        )
