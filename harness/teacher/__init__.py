"""What a student learns from: a teacher's distributions for the trained tokens of a sample.

format.py    what is kept of them and how it lies on the disk (docs/teacher-cache.md says the same for another language)
writer.py    one unit of a cache, whole or absent
reader.py    any sample of a cache, by its content

vocabulary.py  which token ids teacher and student share
samples.py     what a teacher is asked about, and where its cache lies
resident.py    a teacher in memory, whole, in 4 bits, spread out or shared over ranks, and asked
served.py      a teacher behind a server, asked for the scores of given tokens
client.py      how a server is asked
head.py        from hidden states to what is kept of a distribution
capture.py     all samples, unit by unit, into a cache
forecast.py    what that costs, and when it has paid
fidelity.py    what the cache lost
"""
