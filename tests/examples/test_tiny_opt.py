"""The tiny OPT of examples/ is a trained Hugging Face model, and its held-out news is really held out."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import news_corpus
import pytest
import torch
import train_tiny_opt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_OPT = EXAMPLES / "tiny-opt"
NEWS = EXAMPLES / "news.jsonl"
BOS_EOS_ID = 2  # `</s>`, as in every published OPT checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_OPT)


def rouge1_f(reference: str, summary: str) -> float:
    """ROUGE-1 F over words, in percent."""
    counts = [Counter(text.lower().split()) for text in (reference, summary)]
    overlap = (counts[0] & counts[1]).total()
    return 200 * overlap / max(1, counts[0].total() + counts[1].total())


def test_the_word_overlap_is_rouge1_f():
    """Oracle: by hand. 2 of 4 reference words and 2 of 3 summary words are common: F = 2 * 2 / 7."""
    assert rouge1_f("a b c d", "A b x") == pytest.approx(400 / 7)


@pytest.mark.parametrize(
    "text", ["Talvik Motors has 160 workers.", "  two\n\nlines\t", "Café 日本 – 50 €", "</p>"]
)
def test_tokenizer_round_trip_with_bos(tokenizer, text):
    """Oracle: byte-level BPE loses nothing, and OPT's tokenizer puts `</s>` first and nothing last."""
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == BOS_EOS_ID
    assert ids[-1] != BOS_EOS_ID
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_are_those_of_opt(tokenizer):
    """Oracle: the vocabulary of the published OPT checkpoints."""
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)


def test_checkpoint_is_small_float16_and_fits_its_config(tokenizer):
    """Oracle: the sizes of the brief (1-4 MB) and the shapes config.json declares."""
    config = json.loads((TINY_OPT / "config.json").read_text())
    tensors = load_file(TINY_OPT / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert 1e6 < (TINY_OPT / "model.safetensors").stat().st_size < 4e6
    embedding = tensors["model.decoder.embed_tokens.weight"]
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert len(tokenizer) == config["vocab_size"]


def test_greedy_summaries_of_held_out_articles_have_the_words_of_the_reference(tokenizer):
    """Oracle: the references of the generator. The ROUGE-1 measured on 200 articles is in the model card."""
    model = AutoModelForCausalLM.from_pretrained(TINY_OPT, dtype=torch.float32)
    pairs = news_corpus.read_jsonl(NEWS)[:3]
    summaries = train_tiny_opt.summarize(model, tokenizer, [pair["article"] for pair in pairs])
    for pair, summary in zip(pairs, summaries, strict=True):
        assert rouge1_f(pair["highlights"], summary) > 80, summary


def test_news_file_is_the_held_out_part_of_the_default_seed():
    """Oracle: the generator; the file is what the training script writes by default."""
    assert NEWS.read_text() == news_corpus.to_jsonl(news_corpus.held_out_news(0, 200))


def test_corpus_is_deterministic_and_depends_on_the_seed():
    def first_pairs(seed: int) -> list[news_corpus.Pair]:
        return list(islice(news_corpus.news(seed=seed, held_out=False), 50))

    assert first_pairs(7) == first_pairs(7)
    assert first_pairs(7) != first_pairs(8)


def test_no_person_and_no_article_of_the_held_out_part_is_in_the_training_part():
    """Oracle: brute force over 5,000 training articles."""
    held_out = news_corpus.held_out_news(0, 200)
    names = {name for pair in held_out for name in pair.people}
    assert all(pair.people for pair in held_out)
    training = list(islice(news_corpus.news(seed=0, held_out=False), 5000))
    assert not names & {name for pair in training for name in pair.people}
    assert not {pair.article for pair in held_out} & {pair.article for pair in training}
    text = "\n".join(pair.article + pair.highlights for pair in training)
    assert not [name for name in names if name in text]


def test_every_number_and_name_of_the_highlights_is_in_the_article():
    """Oracle: a summary states nothing the article does not; facts are words with a digit or a capital."""
    templates = " ".join(
        event.highlight + " " + " ".join(d.highlight for d in event.details) for event in news_corpus.EVENTS
    )
    for pair in islice(news_corpus.news(seed=3, held_out=False), 1000):
        words = [word.strip("$.,") for word in pair.highlights.split()]
        facts = [word for word in words if (word[0].isdigit() or word[0].isupper()) and word not in templates]
        assert not [fact for fact in facts if fact not in pair.article], pair


def test_training_lowers_the_loss_and_saves_a_folder_that_loads(tmp_path, capsys):
    """Oracle: the printed losses fall, and the saved model gives the logits of the trained one."""
    config = train_tiny_opt.TrainingConfig(
        steps=30, batch_size=4, warmup_steps=5, vocab_size=400, hidden_size=32, num_layers=1, num_heads=2
    )
    torch.manual_seed(0)
    texts = (pair.article for pair in islice(news_corpus.news(seed=0, held_out=False), 100))
    tokenizer = train_tiny_opt.train_tokenizer(texts, config.vocab_size)
    model = train_tiny_opt.build_model(config)
    train_tiny_opt.train(model, tokenizer, config, log_every=29)
    losses = [
        float(line.split("highlights loss")[1].split()[0]) for line in capsys.readouterr().out.splitlines()
    ]
    assert losses[-1] < losses[0] - 1
    train_tiny_opt.save(model, tokenizer, tmp_path)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("Reporters from Halden")["input_ids"]])
    assert ids.tolist() == [tokenizer("Reporters from Halden")["input_ids"]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
