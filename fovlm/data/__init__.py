"""From tar shards to packed batches: the way of one sample.

    tar shard -> index -> order -> sample -> pack -> batch

1. **Shard** (`shards`, `sample_format`). A sample is a run of files in a tar whose names are equal up to the first dot:
   `clip000330.000.jpg` ... `clip000330.003.jpg` are four frames, `clip000330.json` holds question and answer.
   In shards of others, `record` finds these where the source's `fields` say.
2. **Index** (`index`). Each shard is read once; the index beside it has every sample's byte range, checksum, kind and
   number of frames. From then on samples are read by position.
3. **Tokens** (`chat`, `token_cache`, `sample_table`). Each conversation is tokenized once and its tokens stored. The
   table of a source has a row for each group, the conversations of a sample that share its frames (mostly one); all
   ranks and workers map one file, and packs are planned from it.
4. **Order** (`sampling`). `MixtureSampler` says which source a position of the run belongs to, `ShardShuffle` which
   sample of that source it is. Both are pure functions of seed and position: the cursor of a run is one integer.
5. **Sample** (`dataset`). `Dataset.size(position)` is what a sample takes of a pack, `Dataset.read(position)` decodes
   it. A broken sample is replaced by a later one of its source, and reported.
6. **Pack** (`packing`, `dataloader`). `plan_steps` takes consecutive positions up to the cost that the packs of a step
   hold, and deals them to the packs so that these cost about the same; every rank gets the same number of packs.
7. **Batch** (`packing`). `collate` lays the samples of a pack out in tensors; `PackLoader` does it in worker processes.

An example, with the data of `quickstart` (400 clips instead of 8000) and position 1 of the run:

    dataset = open_dataset(experiment, tokenizer, experiment.data.mixture)
    dataset.mix(1)                     (0, 1): source 0 is `video`, and this is its second sample
    dataset.size(1)                    PackSize(frames=4, looks=4, text=25, prompt=17)
    samples, issue = dataset.read(1)   one sample (one for each conversation), with the key "video-000.tar/clip000330";
                                       issue is None: nothing was broken
    plan = next(plan_steps(dataset, pack_budget(experiment), packs=8, cursor=0))
    plan.packs[1]                      [1, 7, 11, 21, 31, 41, 51, 61, 71, 77, 81]: position 1 is in the second pack
    plan.cursor                        85: the next step starts there, on any number of ranks

`synthetic` generates the data of `quickstart`. `tables` reads Parquet, CSV and JSON tables, and `workers` runs
functions in processes, both for `fovlm prepare` and the evaluation.
"""
