"""What a recipe takes from the Hugging Face hub, brought to the shared cache before a node without a network needs it.

    needs.py    what a recipe names: models, tokenizers, data sets
    cache.py    where they lie on this machine, and whether all of each is there
    fetch.py    planned, downloaded (and continued after a cut), compared with the hub's digests, recorded

    $HF_HUB_CACHE/
        models and the files of data sets, as huggingface_hub and transformers keep them
    $HF_HUB_CACHE/../harness-fetched/TYPEs--ID.json
        {"revisions": {asked: commit}, "commits": {commit: {path: {"size", "algorithm", "digest", "mtime"}}}}: what was fetched, by the
        digests that the hub gives for it

The promise: what `harness fetch` has called fetched, a run under HF_HUB_OFFLINE=1 finds, byte for byte what the hub has.
"""
