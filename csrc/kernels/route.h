// route: which experts a token goes to, and with what weight.
//
// The definitions are those of the models' reference implementations: softmax scores (Qwen3-MoE,
// Mixtral), and sigmoid scores with a selection-only correction bias and a limit on expert groups
// (DeepSeek-V3, arXiv 2412.19437). Ties go to the lower index.
#pragma once

namespace ktcore::KTCORE_ISA {

static constexpr int64_t kMaxExperts = 4096;

// Keeps the `k` largest of a stream of (score, index), best first.
struct TopK {
  float* score;
  int64_t* index;
  int64_t k;
  int64_t count = 0;

  KT_INLINE void offer(float s, int64_t i) {
    if (!(s == s)) s = -std::numeric_limits<float>::infinity();
    if (count == k && !(s > score[k - 1])) return;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && s > score[at - 1]; --at) {
      score[at] = score[at - 1];
      index[at] = index[at - 1];
    }
    score[at] = s;
    index[at] = i;
  }
};

// Scores of all experts: softmax or sigmoid of the logits. `padded` is a multiple of 32.
template <class S>
static KT_INLINE void expert_scores(const RouteJob& job, const float* logits, int64_t padded,
                                    float* p) {
  for (int64_t i = 0; i < job.num_experts; ++i) p[i] = logits[i];
  for (int64_t i = job.num_experts; i < padded; ++i) p[i] = -std::numeric_limits<float>::infinity();
  if (job.scoring == Scoring::sigmoid) {
    for (int64_t i = 0; i < padded; i += S::kLanes) {
      S::store(p + i, gate_by_sigmoid<S>(S::set1(1.0f), S::load(p + i)));
    }
    return;
  }
  float top = p[0];
  for (int64_t i = 1; i < job.num_experts; ++i) top = p[i] > top ? p[i] : top;
  typename S::F total = S::zero();
  for (int64_t i = 0; i < padded; i += S::kLanes) {
    const typename S::F e = exp<S>(S::sub(S::load(p + i), S::set1(top)));
    S::store(p + i, e);
  }
  for (int64_t i = job.num_experts; i < padded; ++i) p[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += S::kLanes) total = S::add(total, S::load(p + i));
  const typename S::F inverse = S::set1(1.0f / S::sum(total));
  for (int64_t i = 0; i < padded; i += S::kLanes) S::store(p + i, S::mul(S::load(p + i), inverse));
}

template <class S>
static KT_INLINE void route_token(const RouteJob& job, int64_t t) {
  alignas(64) float p[kMaxExperts];
  alignas(64) float choice[kMaxExperts];
  float best[kMaxExperts];
  int64_t groups[kMaxExperts];
  const int64_t experts = job.num_experts;
  expert_scores<S>(job, job.logits + t * job.stride, round_up(experts, kGroup), p);
  for (int64_t i = 0; i < experts; ++i) {
    choice[i] = job.correction_bias != nullptr ? p[i] + job.correction_bias[i] : p[i];
  }

  int64_t* ids = job.ids + t * job.top_k;
  float* weights = job.weights + t * job.top_k;
  TopK chosen{best, ids, job.top_k};
  if (job.n_group > 1) {
    const int64_t size = experts / job.n_group;
    float group_best[kMaxExperts];
    TopK kept{group_best, groups, job.topk_group};
    for (int64_t g = 0; g < job.n_group; ++g) {
      // A group counts its two best experts where a bias steers the choice, else its best one.
      float top[2];
      int64_t unused[2];
      const int64_t counted = job.correction_bias != nullptr && size > 1 ? 2 : 1;
      TopK in_group{top, unused, counted};
      for (int64_t i = g * size; i < (g + 1) * size; ++i) in_group.offer(choice[i], i);
      kept.offer(counted == 2 ? top[0] + top[1] : top[0], g);
    }
    bool allowed[kMaxExperts] = {};
    for (int64_t k = 0; k < job.topk_group; ++k) allowed[groups[k]] = true;
    for (int64_t i = 0; i < experts; ++i) {
      if (allowed[i / size]) chosen.offer(choice[i], i);
    }
  } else {
    for (int64_t i = 0; i < experts; ++i) chosen.offer(choice[i], i);
  }

  float total = 0.0f;
  for (int64_t k = 0; k < job.top_k; ++k) total += p[ids[k]];
  const float factor = job.scale / (job.renormalize ? total + 1e-20f : 1.0f);
  for (int64_t k = 0; k < job.top_k; ++k) weights[k] = p[ids[k]] * factor;
}

template <class S>
static void route(const RouteJob& job, ThreadPool& pool) {
  const int64_t per_task = ceil_div(8192, job.num_experts);
  parallel_for(pool, ceil_div(job.tokens, per_task), [&](int64_t task, int) {
    const int64_t end = (task + 1) * per_task < job.tokens ? (task + 1) * per_task : job.tokens;
    for (int64_t t = task * per_task; t < end; ++t) route_token<S>(job, t);
  });
}

}  // namespace ktcore::KTCORE_ISA
