"""The losses against plain ones (full logits in float64, differentiated by autograd), what they hold in memory, and what must not leak."""

import math
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.losses import DivergenceLoss, Head, SparseTargets, chunks, dense_divergence, sparse_divergence

N, H, V, K, M = 23, 16, 97, 7, 5
SMALL = 4000  # bytes of a tile: chunks of a few tokens, and the last ones of another size
HEADS = {"plain": {}, "scaled": {"logit_scale": 0.6}, "softcap": {"softcap": 2.5}, "both": {"logit_scale": 1.7, "softcap": 3.0}}
MIX = {"cross_entropy_weight": 0.3, "divergence_weight": 0.8}


# ---- the plain ones


def plain_logits(hidden, head, vocabulary=None):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :vocabulary]


def plain_sparse(hidden, head, targets, gold, *, tail, row_weights):
    """[N] divergence, cross-entropy, agreement, overlap; rows of weight 0 are left out and are 0."""
    rows = []
    for row in range(len(hidden)):
        if row_weights[row] == 0:
            rows.append(torch.zeros(4, dtype=hidden.dtype))
            continue
        log_q = plain_logits(hidden[row : row + 1], head)[0].log_softmax(-1)
        count = int(targets.counts[row])
        kept = targets.ids[row, :count].long()
        p, tail_mass = targets.log_probs[row, :count].to(hidden.dtype).exp(), targets.log_tail[row].to(hidden.dtype).exp()
        p, tail_mass = p / (p.sum() + tail_mass), tail_mass / (p.sum() + tail_mass)
        if tail == "ghost":
            outside = torch.ones(log_q.shape, dtype=torch.bool).index_fill(0, kept, False)
            of_tail = tail_mass * (tail_mass.log() - log_q[outside].exp().sum().log()) if tail_mass > 0 else 0
            divergence = (p * (p.log() - log_q[kept])).sum() + of_tail
        else:
            of_tail = -(tail_mass / M) * sum(log_q[int(draw)] for draw in targets.draws[row]) if tail_mass > 0 else 0
            divergence = -(p * log_q[kept]).sum() + of_tail - targets.entropy[row]
        agreement = (log_q.argmax() == kept[0]).to(hidden.dtype)
        overlap = torch.minimum(p, log_q[kept].exp()).sum()
        rows.append(torch.stack([divergence, -log_q[gold[row]], agreement, overlap]))
    return torch.stack(rows).T if rows else torch.zeros(4, 0, dtype=hidden.dtype)


def plain_dense(student_logits, teacher_logits, *, beta, temperature):
    """[N] divergence with its T^2."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
    if beta == 0:
        rows = p * (p.log() - q.log())
    elif beta == 1:
        rows = q * (q.log() - p.log())
    else:
        m = beta * p + (1 - beta) * q
        rows = beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())
    return rows.sum(-1) * temperature**2


# ---- what they are given


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model(seed, hidden_size=H, tokens=N, vocabulary=V, bias=True, dtype=torch.float64, **head):
    random = partial(torch.randn, generator=generator(seed), dtype=torch.float64)
    hidden, weight = random(tokens, hidden_size), random(vocabulary, hidden_size) / hidden_size**0.5
    return hidden.to(dtype), Head(weight.to(dtype), random(vocabulary).to(dtype) if bias else None, **head)


def cache_of(logits, counts, draws=M, seed=1, width=None):
    """What a cache would hold of these logits: exact, in float64."""
    log_p = logits.double().log_softmax(-1)
    ordered, ids = log_p.sort(-1, descending=True)
    width = width or int(counts.max())
    outside = torch.arange(log_p.shape[1]) >= counts[:, None]
    tail = torch.where(outside, ordered.exp(), 0)
    chosen = torch.multinomial(tail + 1e-300, draws, replacement=True, generator=generator(seed))
    return SparseTargets(
        ids[:, :width].to(torch.int32),
        ordered[:, :width].clone(),
        counts,
        tail.sum(-1).log(),
        -(log_p.exp() * log_p).sum(-1),
        ids.gather(1, chosen).to(torch.int32),
    )


def spoil(hidden, targets, gold, masked):
    """Garbage wherever nothing may look: in unused slots, and in all of a masked row."""
    unused = torch.arange(targets.ids.shape[1]) >= targets.counts[:, None]
    targets.ids[unused] = torch.randint(-5, 10**6, (int(unused.sum()),), generator=generator(3), dtype=torch.int32)
    targets.log_probs[unused] = torch.nan
    for tensor in (hidden, targets.log_probs, targets.log_tail, targets.entropy):
        tensor[masked] = torch.nan
    for tensor in (targets.ids, targets.draws, gold):
        tensor[masked] = -100
    targets.counts[masked] = 200


def problem(bias=True, masked=True, **head):
    """hidden, head, targets, gold, row_weights of two models that differ; some gold tokens are in the head, and some are draws."""
    hidden, student = model(0, bias=bias, **head)
    counts = torch.randint(1, K + 1, (N,), generator=generator(4))
    targets = cache_of(plain_logits(*model(1, hidden_size=H + 3)), counts, width=K)
    gold = torch.randint(0, V, (N,), generator=generator(5))
    gold[::4] = targets.ids[::4, 0].long()
    gold[1::4] = targets.draws[1::4, 2].long()
    row_weights = torch.ones(N, dtype=torch.float64)
    if masked:
        row_weights = torch.rand(N, generator=generator(6), dtype=torch.float64) + 0.5
        row_weights[[0, 7, 8, N - 1]] = 0
        spoil(hidden, targets, gold, row_weights == 0)
    return hidden, student, targets, gold, row_weights


def leaves(hidden, head, dtype=None):
    """The same, as leaves that ask for gradients, in float64 or another dtype."""
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for tensor in (hidden, head.weight, head.bias)
    )
    return hidden, head._replace(weight=weight, bias=bias)


def gradients(loss, hidden, head):
    inputs = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    return torch.autograd.grad(loss, inputs)


def error(found, expected):
    """Relative, over the whole tensor."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def weigh(rows, row_weights):
    return (rows * row_weights)[row_weights != 0].sum()


# ---- values and gradients


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_a_loss_from_a_cache_and_its_gradients_are_those_of_full_logits_in_float64(tail, head, bias, masked):
    hidden, student, targets, gold, row_weights = problem(bias, masked, **HEADS[head])
    exact = leaves(hidden, student)
    divergence, cross_entropy, agreement, overlap = plain_sparse(*exact, targets, gold, tail=tail, row_weights=row_weights)
    loss = weigh(0.3 * cross_entropy + 0.8 * divergence, row_weights)

    single = leaves(hidden, student, torch.float32)
    found = sparse_divergence(*single, targets, gold, tail=tail, row_weights=row_weights, tile_bytes=SMALL, **MIX)

    expected = DivergenceLoss(loss, *(weigh(rows, row_weights) for rows in (divergence, cross_entropy, divergence, agreement, overlap)))
    for name, value, should in zip(found._fields, found, expected, strict=True):
        assert error(value.detach(), should.detach()) <= 1e-5, name
    for value, should in zip(gradients(found.loss, *single), gradients(loss, *exact), strict=True):
        assert error(value, should.nan_to_num(0)) <= 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_loss_from_a_resident_teacher_and_its_gradients_are_those_of_full_logits_in_float64(beta, temperature, head, bias, masked):
    hidden, student, _, gold, row_weights = problem(bias, masked, **HEADS[head])
    teacher = model(1, hidden_size=H + 3, bias=not bias, softcap=4.0, logit_scale=1.1)
    if masked:
        teacher[0][row_weights == 0] = torch.inf
    kept = row_weights != 0
    exact = leaves(hidden, student)
    logits, target = plain_logits(exact[0][kept], exact[1]), plain_logits(teacher[0][kept], teacher[1])
    divergence = plain_dense(logits, target, beta=beta, temperature=temperature)
    cross_entropy = torch.nn.functional.cross_entropy(logits, gold[kept], reduction="none")
    expected = DivergenceLoss(
        0.3 * cross_entropy + 0.8 * divergence,
        divergence,
        cross_entropy,
        plain_dense(logits, target, beta=0, temperature=1),
        (logits.argmax(-1) == target.argmax(-1)).double(),
        torch.minimum(logits.softmax(-1), target.softmax(-1)).sum(-1),
    )
    expected = [(rows * row_weights[kept]).sum() for rows in expected]

    single = leaves(hidden, student, torch.float32)
    singles = [tensor.float() for tensor in teacher[1][:2] if tensor is not None]
    found = dense_divergence(
        *single,
        teacher[0].float(),
        Head(singles[0], singles[1] if len(singles) == 2 else None, *teacher[1][2:]),
        gold,
        beta=beta,
        temperature=temperature,
        row_weights=row_weights,
        tile_bytes=9 * SMALL,
        **MIX,
    )
    for name, value, should in zip(found._fields, found, expected, strict=True):
        assert error(value.detach(), should.detach()) <= 1e-5, name
    for value, should in zip(gradients(found.loss, *single), gradients(expected[0], *exact), strict=True):
        assert error(value, should.nan_to_num(0)) <= 1e-5


@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_gradients_from_a_cache_are_those_of_finite_differences(tail):
    hidden, student, targets, gold, row_weights = problem(**HEADS["both"])
    hidden.nan_to_num_(0)  # for the differences; a masked row's own are 0

    def loss(hidden, weight, bias):
        head = student._replace(weight=weight, bias=bias)
        return sparse_divergence(hidden, head, targets, gold, tail=tail, row_weights=row_weights, tile_bytes=SMALL, **MIX).loss

    exact = leaves(hidden, student)
    assert torch.autograd.gradcheck(loss, (exact[0], exact[1].weight, exact[1].bias), fast_mode=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_gradients_from_a_resident_teacher_are_those_of_finite_differences_at_every_temperature(beta, temperature):
    hidden, student = leaves(*model(0, **HEADS["both"]))
    teacher, gold = model(1), torch.randint(0, V, (N,), generator=generator(5))

    def loss(hidden, weight, bias):
        head = student._replace(weight=weight, bias=bias)
        return dense_divergence(hidden, head, *teacher, gold, beta=beta, temperature=temperature, tile_bytes=9 * SMALL, **MIX).loss

    assert torch.autograd.gradcheck(loss, (hidden, student.weight, student.bias), fast_mode=True)


@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_a_cache_of_the_whole_vocabulary_is_the_resident_teacher(tail):
    teacher, gold = model(1), torch.zeros(N, dtype=torch.long)
    targets = cache_of(plain_logits(*teacher), torch.full((N,), V))
    assert bool((targets.log_tail == -torch.inf).all())
    targets.draws.fill_(10**6)  # there is nothing to draw from
    cached, resident = leaves(*model(0)), leaves(*model(0))
    found = sparse_divergence(*cached, targets, gold, tail=tail, **MIX)
    expected = dense_divergence(*resident, *teacher, gold, **MIX)
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-12)
    for value, should in zip(gradients(found.loss, *cached), gradients(expected.loss, *resident), strict=True):
        assert error(value, should) < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_the_divergences_equal_trls_which_are_without_the_square_of_the_temperature(beta, temperature):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    ours, theirs = (leaves(*model(0, softcap=3.0), torch.float32) for _ in range(2))
    hidden, teacher = model(1, hidden_size=H + 3, dtype=torch.float32, logit_scale=0.5)
    gold = torch.zeros(N, dtype=torch.long)
    found = dense_divergence(*ours, hidden, teacher, gold, beta=beta, temperature=temperature)
    expected, _ = ChunkedDivergenceFunction.apply(
        theirs[0], theirs[1].weight, theirs[1].bias, hidden, teacher.weight, teacher.bias, beta, temperature, 1.0, 3.0, 0.5, None
    )
    expected = expected.sum() * temperature**2
    assert error(found.loss.detach(), expected.detach()) < 1e-5
    for value, should in zip(gradients(found.loss, *ours), gradients(expected, *theirs), strict=True):
        assert error(value, should.double()) < 1e-5


# ---- what a divergence must be


@pytest.mark.parametrize("seed", range(20))
def test_no_ghost_divergence_is_negative_even_when_the_cache_was_rounded(seed):
    hidden, student = model(seed, dtype=torch.float32)
    teacher = plain_logits(*model(seed)) + torch.randn(N, V, generator=generator(seed)) * 0.01 * (seed % 4)
    targets = cache_of(teacher, torch.randint(1, K + 1, (N,), generator=generator(seed)), width=K)
    targets = targets._replace(log_probs=targets.log_probs.half(), log_tail=targets.log_tail.half())
    for row in torch.eye(N):
        assert sparse_divergence(hidden, student, targets, torch.zeros(N, dtype=torch.long), row_weights=row).divergence > -1e-6


def test_a_rounded_cache_of_the_student_itself_teaches_it_nothing():
    hidden, student = leaves(*model(0, dtype=torch.float32))
    targets = cache_of(plain_logits(hidden, student).detach(), torch.full((N,), K))
    targets = targets._replace(log_probs=targets.log_probs.half(), log_tail=targets.log_tail.half())
    assert sparse_divergence(hidden, student, targets, torch.zeros(N, dtype=torch.long)).loss < N * 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_that_is_the_student_has_divergence_0_and_no_gradient(head):
    hidden, student = leaves(*model(0, dtype=torch.float32, **HEADS[head]))
    gold = torch.zeros(N, dtype=torch.long)
    cached = cache_of(plain_logits(hidden.double(), model(0, **HEADS[head])[1]).detach(), torch.full((N,), K))
    found = [sparse_divergence(hidden, student, cached, gold)]
    for beta in (0.0, 0.4, 1.0):
        for temperature in (1.0, 2.0):
            found.append(dense_divergence(hidden, student, hidden, student, gold, beta=beta, temperature=temperature))
    for losses_found in found:
        assert abs(losses_found.loss.item()) < 1e-4 and losses_found.agreement == N
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients(losses_found.loss, hidden, student))
    assert found[1].overlap.item() == pytest.approx(N)


def test_redraws_of_the_tail_converge_to_the_resident_teachers_gradient_and_value_as_one_over_the_root_of_their_number():
    hidden, student = model(0, tokens=1)
    teacher = plain_logits(*model(1, tokens=1))
    gold = torch.zeros(1, dtype=torch.long)
    exact = leaves(hidden, student)
    expected = plain_dense(plain_logits(*exact), teacher, beta=0, temperature=1).sum()
    expected_gradient = gradients(expected, *exact)[1]
    errors = {}
    for draws in (100, 10_000):
        tries = []
        for seed in range(8):
            targets = cache_of(teacher.expand(draws, -1), torch.full((draws,), 2), draws=1, seed=seed)
            repeated = leaves(hidden.expand(draws, -1), student)
            found = sparse_divergence(*repeated, targets, gold.expand(draws), tail="draws")
            tries.append((gradients(found.loss, *repeated)[1] / draws, found.loss.item() / draws))
        errors[draws] = [
            math.sqrt(sum(float((gradient - expected_gradient).norm()) ** 2 for gradient, _ in tries) / len(tries)),
            math.sqrt(sum((value - expected.item()) ** 2 for _, value in tries) / len(tries)),
        ]
        assert errors[draws][0] > 0
    for few, many in zip(errors[100], errors[10_000], strict=True):
        assert 10 / 2 < few / many < 10 * 2
    assert errors[10_000][0] < 0.05 * expected_gradient.norm()


def test_a_student_that_is_certain_and_wrong_about_the_tail_still_has_a_finite_loss_and_gradient():
    logits = torch.zeros(1, V)
    logits[0, 3] = 400.0  # all else underflows in float32
    targets = SparseTargets(torch.tensor([[3]]), torch.tensor([[0.9]]).log(), torch.tensor([1]), torch.tensor([0.1]).log())
    hidden, student = leaves(torch.ones(1, 1), Head(logits.T.clone()))
    found = sparse_divergence(hidden, student, targets, torch.tensor([3]))
    # log Q_tail = log(96) - 400, q[3] = 1
    assert found.loss.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - math.log(V - 1) + 400), rel=1e-6)
    by_logits = gradients(found.loss, hidden, student)[1][:, 0]
    assert by_logits[3].item() == pytest.approx(0.1) and by_logits[0].item() == pytest.approx(-0.1 / (V - 1))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_entries_that_both_rule_out_add_nothing(beta):
    logits = torch.tensor([[0.0], [1.0], [-400.0], [-500.0]])  # the last two underflow in float32
    student, teacher = leaves(torch.ones(1, 1), Head(logits)), Head(torch.tensor([[1.0], [0.0], [-500.0], [-400.0]]))
    found = dense_divergence(*student, torch.ones(1, 1), teacher, torch.tensor([0]), beta=beta)
    two_entries = [torch.tensor([of], dtype=torch.float64) for of in ([0.0, 1.0], [1.0, 0.0])]
    assert found.loss.item() == pytest.approx(plain_dense(*two_entries, beta=beta, temperature=1).item(), rel=1e-6)
    by_logits = gradients(found.loss, *student)[1][:, 0]
    assert by_logits[2:].tolist() == [0, 0] and by_logits[0].item() == pytest.approx(-by_logits[1].item()) != 0


# ---- chunks, dtypes, memory


@pytest.mark.parametrize("tile_bytes", [1, 5 * 4 * V, 10**9])
def test_the_size_of_chunks_changes_nothing_beyond_rounding(tile_bytes):
    hidden, student, targets, gold, row_weights = problem(**HEADS["both"])
    teacher = model(1)
    for loss in (
        lambda *of, **options: sparse_divergence(*of, targets, gold, **options),
        lambda *of, **options: dense_divergence(*of, *teacher, gold, beta=0.5, temperature=2.0, **options),
    ):
        found, expected = leaves(hidden, student), leaves(hidden, student)
        one, other = loss(*found, row_weights=row_weights, tile_bytes=tile_bytes), loss(*expected, row_weights=row_weights)
        assert torch.allclose(torch.stack(one), torch.stack(other), rtol=1e-12)
        for value, should in zip(gradients(one.loss, *found), gradients(other.loss, *expected), strict=True):
            assert error(value, should) < 1e-12


@pytest.fixture
def halves_as_on_cuda(monkeypatch):
    """The products of halves as CUDA has them: halves in, float32 out; so that gradients of logits are rounded here as there."""
    monkeypatch.setattr(chunks, "_product_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(chunks, "_multiply", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(chunks, "_add_product", lambda total, a, b: total.addmm_(a.float(), b.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["ghost", "draws", 0.0, 0.5, 1.0])
@pytest.mark.parametrize("cuda", [False, True])
def test_with_halves_the_error_is_not_worse_than_that_of_full_logits(which, dtype, cuda, request):
    if cuda:
        request.getfixturevalue("halves_as_on_cuda")
    check_halves(which, dtype, torch.device("cpu"), tokens=64, vocabulary=2000, hidden_size=64)


def check_halves(which, dtype, device, tokens, vocabulary, hidden_size):
    sizes = {"tokens": tokens, "vocabulary": vocabulary, "hidden_size": hidden_size, "bias": False, "dtype": dtype}
    hidden, student = model(0, **sizes)
    # A teacher that is near, so that the gradient is a difference of two probabilities that are nearly the same.
    teacher_hidden = (hidden.double() + 0.2 * torch.randn(hidden.shape, generator=generator(9), dtype=torch.float64)).to(dtype)
    gold = torch.randint(0, vocabulary, (tokens,), generator=generator(5))
    hidden, teacher_hidden, gold = hidden.to(device), teacher_hidden.to(device), gold.to(device)
    student = student._replace(weight=student.weight.to(device))
    with torch.no_grad():
        teacher_logits = teacher_hidden.double() @ student.weight.double().T
    if isinstance(which, str):
        cached = cache_of(teacher_logits.cpu(), torch.full((tokens,), K))
        cached = SparseTargets(*(tensor.to(device) for tensor in cached))
        ours = partial(sparse_divergence, targets=cached, gold=gold, tail=which, cross_entropy_weight=0.1)

        def plain(hidden, head):
            ones = torch.ones(tokens, device=device)
            logits = (hidden @ head.weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
            return plain_of_logits(logits, cached, gold, which, ones)
    else:
        ours = partial(
            dense_divergence, teacher_hidden=teacher_hidden, teacher_head=student, gold=gold, beta=which, cross_entropy_weight=0.1
        )

        def plain(hidden, head):
            logits = (hidden @ head.weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
            target = (teacher_hidden.to(hidden.dtype) @ head.weight.detach().T).to(logits.dtype)
            return plain_dense(logits, target, beta=which, temperature=1).sum() + 0.1 * torch.nn.functional.cross_entropy(
                logits, gold, reduction="sum"
            )

    exact, full, fused = leaves(hidden, student, torch.float64), leaves(hidden, student), leaves(hidden, student)
    expected, usual = plain(*exact), plain(*full)
    found = ours(*fused).loss if isinstance(which, str) else ours(fused[0], fused[1]).loss
    assert error(found.detach(), expected.detach()) <= error(usual.detach(), expected.detach()) + 1e-5
    for name, should, value, other in zip(
        "hidden weight".split(), gradients(expected, *exact), gradients(found, *fused), gradients(usual, *full), strict=True
    ):
        assert value.dtype == dtype
        assert error(value, should) <= 1.02 * error(other, should), name


def plain_of_logits(logits, targets, gold, tail, row_weights):
    """As plain_sparse, for all rows at once and counts that are all K."""
    log_q = logits.log_softmax(-1)
    ids, p, tail_mass = targets.ids.long(), targets.log_probs.exp().to(logits.dtype), targets.log_tail.exp().to(logits.dtype)
    of_head = (p * (p.log() - log_q.gather(1, ids))).sum(-1)
    if tail == "ghost":
        outside = log_q.exp().scatter(1, ids, 0).sum(-1)
        of_tail = tail_mass * (tail_mass.log() - outside.log())
    else:
        of_head = -(p * log_q.gather(1, ids)).sum(-1) - targets.entropy.to(logits.dtype)
        of_tail = -tail_mass * log_q.gather(1, targets.draws.long()).mean(-1)
    cross_entropy = -log_q.gather(1, gold[:, None])[:, 0]
    return ((of_head + of_tail + 0.1 * cross_entropy) * row_weights).sum()


class Watch(TorchDispatchMode):
    """The largest tensor that any operation gave, what was alive at once of them all, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = self.peak_bytes = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.products += "mm" in function.__name__
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result


def big_problem(tokens, vocabulary, hidden_size=8):
    hidden, student = model(0, tokens=tokens, vocabulary=vocabulary, hidden_size=hidden_size, bias=False, dtype=torch.float32)
    targets = SparseTargets(
        torch.arange(K).expand(tokens, K), torch.full((tokens, K), -3.0), torch.full((tokens,), K), torch.full((tokens,), -2.0)
    )
    return hidden, student, targets, torch.zeros(tokens, dtype=torch.long)


def test_no_tensor_of_tokens_times_vocabulary_exists_forward_or_backward():
    hidden, student, targets, gold = big_problem(tokens=500, vocabulary=3000)
    for loss in (
        partial(sparse_divergence, targets=targets, gold=gold, tile_bytes=10 * 3000 * 4),
        partial(dense_divergence, teacher_hidden=hidden, teacher_head=student, gold=gold, beta=0.5, tile_bytes=80 * 3000 * 4),
    ):
        for_gradients = leaves(hidden, student)
        with Watch() as watch:
            loss(*for_gradients).loss.backward()
        assert 3000 <= watch.largest <= 10 * 3000


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("which", ["ghost", (0.0, 1.0), (0.0, 2.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)])
def test_what_is_made_of_logits_fits_in_the_tile_bytes_and_fills_them(which, softcap):
    hidden, student, targets, gold = big_problem(tokens=400, vocabulary=10_000)
    both, tile_bytes = leaves(hidden, student._replace(softcap=softcap)), 10 * 100 * 10_000 * 4
    with Watch() as watch:
        if which == "ghost":
            sparse_divergence(*both, targets, gold, tile_bytes=tile_bytes // 10, **MIX)
            tile_bytes //= 10
        else:
            beta, temperature = which
            dense_divergence(*both, hidden, student, gold, beta=beta, temperature=temperature, tile_bytes=tile_bytes, **MIX)
    of_logits = watch.peak_bytes - both[1].weight.nbytes
    # Full but for what keeps the chunks equal, and over it only by what has no vocabulary in its shape.
    assert 0.75 * tile_bytes < of_logits < 1.03 * tile_bytes + 2**19


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    program = """
import resource, sys, torch
from tests.test_losses import big_problem, leaves, sparse_divergence, dense_divergence
def peak_mib(tokens):
    hidden, student, targets, gold = big_problem(tokens, vocabulary=16000)
    model = leaves(hidden, student)
    sparse_divergence(*model, targets, gold, tile_bytes=1 << 24).loss.backward()
    dense_divergence(*model, hidden, student, gold, beta=0.5, temperature=2.0, tile_bytes=1 << 24).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
few = peak_mib(256)
print(peak_mib(4096) - few)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4096 * 16000 * 4 / 2**20 / 8, "one tensor of tokens x vocabulary is 250 MiB"


# ---- who gets a gradient, and when


@pytest.mark.parametrize(
    ("trains", "sparse_products", "dense_products"),
    [((), 1, 2), (("hidden",), 2, 3), (("weight",), 2, 3), (("bias",), 1, 2), (("hidden", "weight", "bias"), 3, 4)],
)
def test_only_what_trains_is_paid_for(trains, sparse_products, dense_products):
    hidden, student = model(0)
    targets, gold = cache_of(plain_logits(*model(1)), torch.full((N,), K)), torch.zeros(N, dtype=torch.long)
    tensors = {"hidden": hidden, "weight": student.weight, "bias": student.bias}
    for name in trains:
        tensors[name].requires_grad_()
    for loss, products in (
        (partial(sparse_divergence, hidden, student, targets, gold), sparse_products),
        (partial(dense_divergence, hidden, student, *model(1), gold), dense_products),
    ):
        with Watch() as watch:
            found = loss()
        assert watch.products == products and found.loss.requires_grad == bool(trains)
        assert not any(metric.requires_grad for metric in found[1:])
        if trains:
            found.loss.backward()
        assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(trains)
        with torch.no_grad(), Watch() as watch:
            found = loss()
        assert watch.products == products - len(set(trains) - {"bias"}) and found.loss.grad_fn is None


def test_the_teacher_gets_no_gradient():
    student, teacher = leaves(*model(0)), leaves(*model(1))
    dense_divergence(*student, *teacher, torch.zeros(N, dtype=torch.long), beta=0.5).loss.backward()
    assert teacher[0].grad is None and teacher[1].weight.grad is None and student[0].grad is not None


def test_a_scaled_loss_scales_its_gradients_and_a_second_backward_finds_the_same():
    hidden, student, targets, gold, row_weights = problem()
    model_ = leaves(hidden, student)
    loss = sparse_divergence(*model_, targets, gold, row_weights=row_weights).loss
    once = torch.autograd.grad(loss, model_[1].weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss / 4, model_[1].weight, retain_graph=True)[0], once / 4)
    assert torch.equal(torch.autograd.grad(loss, model_[1].weight)[0], once)


def test_a_head_that_is_a_shard_again_before_the_backward_still_gets_its_gradient():
    hidden, student, targets, gold, row_weights = problem()
    full, sharded = leaves(hidden, student), leaves(hidden, student)
    expected = gradients(sparse_divergence(*full, targets, gold, row_weights=row_weights).loss, *full)
    by_weight = []
    sharded[1].weight.register_hook(by_weight.append)
    loss = sparse_divergence(*sharded, targets, gold, row_weights=row_weights).loss
    sharded[1].weight.data = torch.empty(0, dtype=torch.float64)
    by_hidden = torch.autograd.grad(loss, [sharded[0], sharded[1].weight])[0]
    assert torch.equal(by_hidden, expected[0]) and torch.equal(by_weight[0], expected[1])


def test_autocast_does_not_round_what_is_summed_here():
    hidden, student, targets, gold, row_weights = problem()
    inside, outside = leaves(hidden, student, torch.float32), leaves(hidden, student, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = sparse_divergence(*inside, targets, gold, row_weights=row_weights)
    other = sparse_divergence(*outside, targets, gold, row_weights=row_weights)
    assert torch.equal(torch.stack(one), torch.stack(other))
    for value, should in zip(gradients(one.loss, *inside), gradients(other.loss, *outside), strict=True):
        assert torch.equal(value, should)


@pytest.mark.parametrize("which", ["no tokens", "all masked"])
def test_a_batch_without_a_token_that_counts_is_0_with_gradients_of_0(which):
    hidden, student, targets, gold, row_weights = problem()
    teacher = model(1)
    if which == "no tokens":
        hidden, gold, row_weights, teacher = hidden[:0], gold[:0], row_weights[:0], (teacher[0][:0], teacher[1])
        targets = SparseTargets(*(tensor[:0] for tensor in targets))
    else:
        row_weights = torch.zeros_like(row_weights)
        spoil(hidden, targets, gold, row_weights == 0)
    for tail in ("ghost", "draws"):
        both = leaves(hidden, student)
        found = sparse_divergence(*both, targets, gold, tail=tail, row_weights=row_weights, **MIX)
        assert torch.stack(found).eq(0).all() and all(gradient.eq(0).all() for gradient in gradients(found.loss, *both))
    both = leaves(hidden, student)
    found = dense_divergence(*both, *teacher, gold, row_weights=row_weights, beta=0.5, **MIX)
    assert torch.stack(found).eq(0).all() and all(gradient.eq(0).all() for gradient in gradients(found.loss, *both))


# ---- vocabularies, and what is refused


def padded(hidden, head, height):
    extra = torch.full((height - V, head.weight.shape[1]), 3.0, dtype=torch.float64)
    return hidden, head._replace(weight=torch.cat([head.weight, extra]), bias=torch.cat([head.bias, extra[:, 0]]))


def test_rows_of_a_head_that_are_padding_take_no_part_and_get_no_gradient():
    gold, targets = torch.zeros(N, dtype=torch.long), cache_of(plain_logits(*model(1)), torch.full((N,), K))
    for true, with_padding in (
        (
            lambda student: sparse_divergence(*student, targets, gold),
            lambda student: sparse_divergence(*student, targets, gold, vocabulary=V),
        ),
        (
            lambda student: dense_divergence(*student, *model(1), gold),
            lambda student: dense_divergence(*student, *padded(*model(1), V + 15), gold, vocabulary=V),
        ),
    ):
        exact, larger = leaves(*model(0)), leaves(*padded(*model(0), V + 8))
        expected, found = true(exact), with_padding(larger)
        assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-12)
        by_hidden, by_weight, by_bias = gradients(found.loss, *larger)
        assert by_weight[V:].eq(0).all() and by_bias[V:].eq(0).all()
        for value, should in zip((by_hidden, by_weight[:V], by_bias[:V]), gradients(expected.loss, *exact), strict=True):
            assert error(value, should) < 1e-12


REFUSED = {
    "tail": (dict(tail="uniform"), 'tail = "uniform"; must be "ghost" or "draws"'),
    "vocabulary": (dict(vocabulary=V + 1), f"vocabulary = {V + 1} of a head with {V} rows; must be 1 to {V}"),
    "draws": (dict(tail="draws", drop="draws"), "targets without draws and entropy"),
    "entropy": (dict(tail="draws", drop="entropy"), "targets without draws and entropy"),
    "log_probs": (dict(narrow="log_probs"), r"ids \(23, 7\), log_probs \(23, 6\); must be \[N, K\] both"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_a_cache_cannot_answer_is_refused(wrong):
    options, message = REFUSED[wrong]
    hidden, student, targets, gold, _ = problem(masked=False)
    options = dict(options)
    if dropped := options.pop("drop", None):
        targets = targets._replace(**{dropped: None})
    if narrowed := options.pop("narrow", None):
        targets = targets._replace(**{narrowed: getattr(targets, narrowed)[:, 1:]})
    with pytest.raises(ValueError, match=message):
        sparse_divergence(hidden, student, targets, gold, **options)


def test_a_resident_teacher_of_another_vocabulary_or_an_impossible_divergence_is_refused():
    gold = torch.zeros(N, dtype=torch.long)
    with pytest.raises(ValueError, match=f"student's head has {V} rows, the teacher's {V + 3}; name the vocabulary"):
        dense_divergence(*model(0), *model(1, vocabulary=V + 3), gold)
    for options in ({"beta": 1.1}, {"beta": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="beta must be from 0 to 1 and temperature > 0"):
            dense_divergence(*model(0), *model(1), gold, **options)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["ghost", "draws", 0.0, 0.5, 1.0])
def test_on_a_gpu_the_error_with_halves_is_not_worse_than_that_of_full_logits(which, dtype):
    check_halves(which, dtype, torch.device("cuda"), tokens=512, vocabulary=32000, hidden_size=512)


@pytest.mark.gpu
def test_on_a_gpu_peak_memory_is_the_tile_the_states_and_the_heads_gradient():
    hidden, student, targets, gold = big_problem(tokens=8192, vocabulary=128_000, hidden_size=512)
    targets, gold = SparseTargets(*(tensor.cuda() for tensor in targets[:4])), gold.cuda()
    both = leaves(hidden.cuda(), student._replace(weight=student.weight.cuda()), torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparse_divergence(*both, targets, gold, tile_bytes=1 << 28).loss.backward()
    kept = (128_000 + 8192) * 512 * (4 + 2)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * ((1 << 28) + kept) + 2**26
