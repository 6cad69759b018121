"""Token windows to distil on, made offline: text sampled from the dense model, and novels.

Sampled text is of three kinds: chats whose every turn the model writes itself, chats that begin
with a question on a topic, and plain text on a topic. Each window has a seed of its own number, so
a larger run begins with the windows of a smaller one only if the batch is the same.

Prose is the five Austen novels of the test fixtures; what is held out is Persuasion, which neither
those nor anything else here was trained on, and sampled windows on topics of their own.

Knows: topics, the chat format of SmolLM2 (ChatML), windows. Does not know: losses, adapters.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import StaticCache

from mlx_flash.calibration.text import DEFAULT as PERSUASION

ROOT = Path(__file__).parents[2]
NOVELS = ROOT / "tests" / "fixtures" / "novels.txt.xz"
WINDOW = 256
TEMPERATURE, TOP_P = 1.0, 0.95
HELD_OUT_SEED = 1_000_000

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TURNS = ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")
QUESTIONS = (
    "Explain {} to a beginner.",
    "What is the history of {}?",
    "Write a short story about {}.",
    "Give me five tips on {}.",
    "Write a poem about {}.",
    "Why does {} matter?",
    "Summarize what is known about {}.",
    "Write an email to a colleague about {}.",
    "What are the pros and cons of {}?",
    "I have trouble with {}. What should I do?",
    "Compare {} with something similar.",
    "Write a Python function that has to do with {}.",
    "Make a list of questions for a quiz on {}.",
    "What would an expert say about {}?",
)
OPENINGS = (
    "{} is",
    "The history of {} begins",
    "# An introduction to {}\n\n",
    "When people talk about {}, they",
    "Once upon a time, there was a girl who loved {}.",
    "In recent years, {} has",
    "Chapter 1: {}\n\n",
)
TOPICS = """gardening; the French Revolution; photosynthesis; bread; black holes; chess; sleep;
prime numbers; volcanoes; jazz; climate change; bees; the Roman Empire; vaccines; sailing; poetry;
electric cars; ancient Egypt; basketball; sorting lists; coral reefs; budgeting; the Moon; mountain
climbing; tea; democracy; bicycles; machine learning; whales; the printing press; yoga; bridges;
dinosaurs; coffee; gravity; public speaking; the Silk Road; painting; spiders; job interviews;
rivers; antibiotics; trains; fractions; loneliness; the Great Wall of China; cheese; earthquakes;
violins; recycling; ants; dentists; probability; deserts; football; the human heart; lighthouses;
sculpture; databases; penguins; friendship; weather forecasts; the Renaissance; salt; cameras;
learning a language; wolves; taxes; the periodic table; dancing; castles; DNA; swimming; soup;
Shakespeare; solar panels; owls; trigonometry; moving house; pirates; glaciers; knitting; elections;
the brain; rice; airplanes; horses; logic; anger; the Industrial Revolution; mushrooms; museums;
diabetes; running; maps; rainforests; money; guitars; robots; cats; time management; the deep sea;
Newton's laws; breakfast; novels; trees; clouds; insurance; the Vikings; toothaches; string parsing;
mirrors; camping; stars; parenting; glass; ethics; wine; tigers; statistics; typewriters; snow;
beaches; philosophy; a broken heart; steam engines; pottery; rabbits; vitamins; roads; the Olympics;
calculus; a lost dog; batteries; theatre; potatoes; archaeology; birthdays; the internet; hats"""
HELD_OUT_TOPICS = """windmills; chocolate; the Cold War; elephants; insomnia; recursion; opera;
tides; carpentry; bacteria; kindness; the Aztecs; skiing; inflation; telescopes; onions; foxes;
geometry; negotiation; submarines; haiku; allergies; marathons; the Black Death; web pages; hiking;
fireflies; libraries; stress; olive oil; parrots; magnets"""


def topics(held_out: bool) -> list[str]:
    """What sampled windows are about; held-out ones have topics of their own."""
    text = HELD_OUT_TOPICS if held_out else TOPICS
    return [topic.strip().replace("\n", " ") for topic in text.split(";")]


def prompt(number: int, held_out: bool) -> tuple[str, bool]:
    """How window ``number`` begins, and whether it is a chat."""
    random = np.random.default_rng(number + (HELD_OUT_SEED if held_out else 0))
    names = topics(held_out)
    topic = names[random.integers(len(names))]
    kind = number % 4
    if kind == 0:
        return HEAD, True
    if kind == 3:
        opening = OPENINGS[random.integers(len(OPENINGS))].format(topic)
        return opening[0].upper() + opening[1:], False
    return HEAD + QUESTIONS[random.integers(len(QUESTIONS))].format(topic) + TURNS[0], True


@torch.inference_mode()
def sample(
    model: torch.nn.Module, tokenizer: Tokenizer, first: int, count: int, held_out: bool
) -> np.ndarray:
    """Windows ``first`` to ``first + count`` in one batch, int32 [count, WINDOW].

    Nucleus sampling. Where a turn of a chat ends, the next one is begun; plain text that ends goes
    on with the next text.
    """
    end, begin = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    turns = [tokenizer.encode(turn)[1:] for turn in TURNS]
    prompts = [prompt(n, held_out) for n in range(first, first + count)]
    forced = [list(tokenizer.encode(text)) for text, _ in prompts]
    speaks = [int(not text.endswith(TURNS[0])) for text, _ in prompts]  # 1: the user is speaking
    generator = torch.Generator().manual_seed(first + (HELD_OUT_SEED if held_out else 0))
    cache = StaticCache(config=model.config, max_cache_len=WINDOW)
    tokens = np.zeros((count, WINDOW), np.int32)
    logits = None
    for position in range(WINDOW):
        drawn = [begin] * count if logits is None else _nucleus(logits, generator).tolist()
        for i in range(count):
            if forced[i]:
                token = forced[i].pop(0)
            else:
                token = drawn[i]
                if prompts[i][1] and token in (end, begin):
                    token = end
                    speaks[i] = 1 - speaks[i]
                    forced[i] = list(turns[speaks[i]])
            tokens[i, position] = token
        column = torch.from_numpy(tokens[:, position : position + 1]).long()
        logits = model(
            input_ids=column,
            past_key_values=cache,
            cache_position=torch.tensor([position]),
            position_ids=torch.full((count, 1), position),
            use_cache=True,
        ).logits[:, -1]
    return tokens


def _nucleus(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # The nucleus lies within the 512 likeliest tokens but for a rest that does not matter.
    values, indices = torch.topk(logits / TEMPERATURE, 512, dim=-1)
    shares = torch.softmax(values, dim=-1)
    before = torch.cumsum(shares, dim=-1) - shares
    shares = torch.where(before < TOP_P, shares, 0)
    return indices.gather(1, torch.multinomial(shares, 1, generator=generator))[:, 0]


def sampled(
    model: torch.nn.Module, tokenizer: Tokenizer, path: Path, count: int, batch: int, held_out: bool
) -> np.ndarray:
    """The first ``count`` windows; made, batch by batch, where ``path`` does not have them yet."""
    there = np.load(path) if path.exists() else np.zeros((0, WINDOW), np.int32)
    progress = tqdm(total=count, initial=len(there), unit="window", desc=path.name)
    while len(there) < count:
        more = sample(model, tokenizer, len(there), batch, held_out)
        there = np.concatenate([there, more])
        temporary = path.with_suffix(".partial.npy")
        np.save(temporary, there)
        temporary.replace(path)
        progress.update(batch)
    progress.close()
    return there[:count]


def prose(tokenizer: Tokenizer, held_out: bool) -> np.ndarray:
    """The novels, or Persuasion, as windows side by side, int32 [windows, WINDOW]."""
    book = PERSUASION.read_bytes()
    text = book if held_out else lzma.decompress(NOVELS.read_bytes())
    text = text.decode().replace("\r\n", "\n")
    # Lines of a printed book are broken anywhere; paragraphs are what a model knows.
    paragraphs = [" ".join(p.split("\n")) for p in text.split("\n\n")]
    ids = tokenizer.encode("\n\n".join(paragraphs))
    count = len(ids) // WINDOW
    return np.array(ids[: count * WINDOW], np.int32).reshape(count, WINDOW)
