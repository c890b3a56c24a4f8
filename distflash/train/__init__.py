"""The reference training job: a byte-level language model on any text, over any (dp x cp) mesh of GPUs or CPU processes.

config      what a run is asked to do        model       the decoder             data        text -> batches
placement   replicas or FSDP2                optimize    AdamW, schedule, clip   loop        the job itself
compare     P ranks against one process      checkpoint  atomic, no pickle       report      progress, metrics, curve, sample
"""
