"""Which data may reach the shipped weights, and under which licence.

A source is used only if its licence lets the trained weights be shipped: public domain, CC0, CC BY,
CC BY-SA, Apache-2.0, MIT or as permissive. What is not in `SOURCES` stays out, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """One dataset that the base model is trained on."""

    title: str
    licence: str
    citation: str


SOURCES: dict[str, Source] = {
    "ambigqa": Source("AmbigQA", "CC BY-SA 3.0", "Min et al. 2020"),
    "anem": Source("AnEM", "CC BY-SA 3.0", "Ohta et al. 2012"),
    "babi": Source("bAbI tasks", "CC BY 3.0", "Weston et al. 2015"),
    "broad_twitter_corpus": Source(
        "Broad Twitter Corpus", "CC BY 4.0", "Derczynski, Bontcheva and Roberts 2016"
    ),
    "circa": Source("Circa", "CC BY 4.0", "Louis, Roth and Radlinski 2020"),
    "coached_conv_pref": Source(
        "Coached Conversational Preference Elicitation", "CC BY 4.0", "Radlinski et al. 2019"
    ),
    "cosmosqa": Source("Cosmos QA", "CC BY 4.0", "Huang et al. 2019"),
    "country_json": Source("country-json", "MIT", "github.com/samayo/country-json"),
    "disfl_qa": Source("Disfl-QA", "CC BY 4.0", "Gupta et al. 2021"),
    "doqa": Source("DoQA", "CC BY-SA 4.0", "Campos et al. 2020"),
    "e2e": Source("E2E NLG", "CC BY-SA 4.0", "Novikova, Dušek and Rieser 2017"),
    "eurlex": Source(
        "EUR-Lex documents", "EU reuse policy", "European Union, Decision 2011/833/EU"
    ),
    "gap": Source("GAP coreference", "Apache-2.0", "Webster et al. 2018"),
    "google_wellformed_query": Source(
        "Query Wellformedness", "CC BY-SA 4.0", "Faruqui and Das 2018"
    ),
    "hotpotqa": Source("HotpotQA", "CC BY-SA 4.0", "Yang et al. 2018"),
    "hwu64": Source("HWU64 (NLU evaluation data)", "CC BY 4.0", "Liu et al. 2019"),
    "hybridqa": Source("HybridQA", "CC BY 4.0", "Chen et al. 2020"),
    "instruction_induction": Source("Instruction Induction", "Apache-2.0", "Honovich et al. 2022"),
    "librispeech": Source("LibriSpeech transcripts", "CC BY 4.0", "Panayotov et al. 2015"),
    "ljspeech": Source("LJ Speech transcripts", "public domain", "Ito and Johnson 2017"),
    "multi_woz_v22": Source("MultiWOZ 2.2", "MIT or Apache-2.0", "Zang et al. 2020"),
    "natural_instructions": Source(
        "Natural Instructions and Super-NaturalInstructions (task definitions)",
        "Apache-2.0",
        "Mishra et al. 2022; Wang et al. 2022",
    ),
    "natural_questions": Source("Natural Questions", "CC BY-SA 3.0", "Kwiatkowski et al. 2019"),
    "paws_x": Source(
        "PAWS-X, English (Wikipedia sentences)",
        "free use for any purpose; text CC BY-SA",
        "Yang et al. 2019",
    ),
    "prost": Source("PROST", "Apache-2.0", "Aroca-Ouellette et al. 2021"),
    "qasc": Source("QASC", "CC BY 4.0", "Khot et al. 2020"),
    "qasper": Source("Qasper", "CC BY 4.0", "Dasigi et al. 2021"),
    "ropes": Source("ROPES", "CC BY 4.0", "Lin et al. 2019"),
    "scitail": Source("SciTail", "Apache-2.0", "Khot, Sabharwal and Clark 2018"),
    "smcalflow": Source("SMCalFlow", "CC BY-SA 4.0", "Andreas et al. 2020"),
    "snips": Source("Snips NLU benchmark", "CC0 1.0", "Coucke et al. 2018"),
    "snli": Source("SNLI", "CC BY-SA 4.0", "Bowman et al. 2015"),
    "snli_cad": Source(
        "Counterfactually augmented SNLI", "Apache-2.0", "Kaushik, Hovy and Lipton 2020"
    ),
    "vader": Source("VADER sentiment lexicon", "MIT", "Hutto and Gilbert 2014"),
    "wiki_auto": Source("Wiki-Auto", "CC BY-SA 3.0", "Jiang et al. 2020"),
    "wikisplit": Source("WikiSplit", "CC BY-SA 4.0", "Botha et al. 2018"),
    "wikitext": Source("WikiText-103", "CC BY-SA 3.0", "Merity et al. 2016"),
    "winogrande": Source("WinoGrande", "CC BY", "Sakaguchi et al. 2020"),
    "wordnet": Source("WordNet", "WordNet licence (permissive)", "Princeton University"),
    "xquad": Source("XQuAD, English", "CC BY-SA 4.0", "Artetxe, Ruder and Yogatama 2020"),
}
"""The allowlist, by the short name that the rest of this package uses."""

SUPERNI_SOURCES: dict[str, str] = {
    **{name: name for name in SOURCES},
    **{
        f"country_{field}_dataset": "country_json"
        for field in [
            "abbreviation",
            "barcode_prefix",
            "calling_code",
            "capital_city",
            "currency",
            "domain_tld",
            "independence_year",
            "iso_numeric",
            "national_dish",
        ]
    },
    "librispeech_asr,": "librispeech",
    "lj_speec": "ljspeech",
    "scitailv1.1": "scitail",
    "wiki_auto_all_data": "wiki_auto",
}
"""The `source` field of a Super-NaturalInstructions task, as written there, to a key of SOURCES."""

NATURAL_INSTRUCTIONS_V1: tuple[str, ...] = ("cosmosqa", "qasc", "ropes", "winogrande")
"""Sources whose tasks of the first Natural Instructions (`subtaskNNN_SOURCE_...`) are used."""

INSTRUCTION_INDUCTION_TASKS: tuple[str, ...] = (
    "active_to_passive",
    "antonyms",
    "diff",
    "first_word_letter",
    "larger_animal",
    "letters_list",
    "negation",
    "num_to_verbal",
    "orthography_starts_with",
    "second_word_letter",
    "singular_to_plural",
    "sum",
    "synonyms",
    "taxonomy_animal",
)
"""`sentiment` and `word_in_context` come from benchmark tasks, the others from unclear sources."""

HELD_OUT_WORDS: tuple[str, ...] = (
    "amazon",
    "yelp",
    "imdb",
    "agnews",
    "dbpedia",
    "yahoo",
    "mnli",
    "multinli",
    "rte",
    "qqp",
    "quora",
    "sst",
    "boolq",
    "multirc",
    "wic",
    "copa",
    "commitmentbank",
    "superglue",
    "glue",
    "clinc",
    "banking",
)
"""A task or source with one of these words in its name is a benchmark, or made from one."""

LEFT_OUT: dict[str, str] = {
    "benchmarks": "the 15 tasks of the continual-learning benchmark and their sources (Amazon,"
    " Yelp, IMDB, AG News, DBpedia, Yahoo, MNLI, RTE, CB, QQP/Quora, SST/MR, BoolQ, MultiRC, WiC,"
    " COPA; MCTACO, whose sentences are MultiRC's; XL-WiC), CLINC150, Banking77, MMLU, BIG-bench",
    "non-commercial or research only": "ANLI, SICK, MSRP, ASSET, SciQ, QuAIL, SAMSum, RecipeNLG,"
    " ASDiv, SPOLIN, TED, XL-Sum, DialogRE, MSR-SQA, Gigaword, CoNLL, SentEval sets, ATIS, ROSTD,"
    " DART (which contains WebNLG)",
    "licence unknown or unclear": "ROCStories and all that builds on it (ART, GLUCOSE, TellMeWhy,"
    " StoryCommonsense, Event2Mind, Story Cloze), DNC, Bizarro, TREC, CoQA, SWAG, PIQA, ComQA,"
    " FreebaseQA, TORQUE, PICO, biomedical corpora other than AnEM, LiMiT (sentences of novels),"
    " QED (annotations), WikiMovies, and all else not listed above",
    "unwanted text": "HateXplain and StereoSet, whose licences would allow it",
}
"""What the model card says about data that was at hand and not used."""
