"""Benchmarks. Each command prints a table and writes a JSON record to ``results/``.

- ``orthogonalization``: error and time of the polar-factor methods
- ``optimizer_step``: time and memory of a whole step, beside torch's optimizers and other packages
- ``matrix_problems``: the matrix problems of the PolarGrad paper, learning rates swept
- ``traffic``: bytes and collectives of a step on several processes
- ``monitors``: the cost of the monitors in the demo
- ``sick_runs``: the demo healthy, sick in three ways, and steered by ``AutoWeightDecay``; the pictures of the docs
- ``variants``: the demo with variants of the recipe, each with several seeds
- ``embedded_text``: optimizers compared by the same rules, learning rates over widths, schedules, precisions; hours
- ``routing_corpus``: how often routing is right on architectures that nobody here wrote
- ``small_trainings``: detection, diffusion, graphs, a GAN, tables and fine-tuning, beside AdamW; learning rates swept
- ``kills``: runs killed at random moments of their saves, resumed, and compared with one that was not
- ``large_data``: the time and memory that 4 GiB of text take
- ``saving_time``: how long a save takes, and how long it stops training
- ``gpu``: all that needs a GPU, in one command of at most nine minutes
- ``tables``: fills the tables of the docs from the records
"""
