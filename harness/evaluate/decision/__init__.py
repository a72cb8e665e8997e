"""The decision report: prompt, retrieve or fine-tune, said for each behaviour from the same items under every arm.

    schema      the recipe of `harness decide`
    questions   rows -> items with their behaviours; what is wrong with gold itself
    retrieve    BM25 over passages or tool documents
    arms        how each arm asks an item
    verdicts    from what every arm got right to a verdict for each behaviour, with its reasons and evidence
    run         the arms, one model in memory at a time, kept in OUTPUT/arms/ and not run again
    costs       what a model weighs, and how long its training took
    report      all of it as one JSON object, and as Markdown
    page        the same as one HTML page; plots draws for it

Only `run` loads torch, when it generates.
"""
