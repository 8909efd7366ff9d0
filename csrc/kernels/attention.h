// attention: softmax(q k^T * scale) v over paged keys and values, causal, for heads of queries that
// share heads of keys and values (arXiv 2305.13245); softmax and sums on the fly (arXiv 2205.14135).
//
// A page's keys lie column by column, so that a vector of scores is one of neighbouring positions, and
// its values position by position, so that a vector of outputs is one of neighbouring columns: rows of
// queries, in registers, are multiplied with both as they come from memory.
//
// The sums run over spans of kSpanPositions, and then over the spans in their order, for every row of
// its own: so the result depends neither on threads, nor on the batch, nor on what is in the positions
// that a row does not see.
#pragma once

namespace ktcore::KTCORE_ISA {

// What keys and values are stored as, and how many bf16 add up to such a number, if two are enough.
template <class S>
struct KvF32 {
  using T = float;
  static constexpr int kBf16s = 0;
  static KT_INLINE typename S::F load(const T* p) { return S::load(p); }
};
template <class S>
struct KvF16 {
  using T = uint16_t;
  static constexpr int kBf16s = 2;
  static KT_INLINE typename S::F load(const T* p) { return S::load_f16(p); }
};
template <class S>
struct KvBf16 {
  using T = uint16_t;
  static constexpr int kBf16s = 1;
  static KT_INLINE typename S::F load(const T* p) { return S::load_bf16(p); }
};

static constexpr float kNone = -std::numeric_limits<float>::infinity();

// out [R][positions of a page] = q [R][size] times a page's keys [size][positions]. The next page's
// keys, `ahead` elements on, are asked for meanwhile: processors do not foresee where it lies.
template <class S, class E, int R>
KT_NOINLINE static void score_rows(const float* q, int64_t size, const typename E::T* keys,
                                   int64_t ahead, float* out) {
  constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
  for (int v0 = 0; v0 < static_cast<int>(kPagePositions) / S::kLanes; v0 += V) {
    const typename E::T* k = keys + v0 * S::kLanes;
    typename S::F sum[V][R];
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) sum[v][r] = S::zero();
    }
    for (int64_t c = 0; c < size; ++c, k += kPagePositions) {
      typename S::F key[V];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        S::prefetch(reinterpret_cast<const uint8_t*>(k + v * S::kLanes + ahead));
        key[v] = E::load(k + v * S::kLanes);
        if constexpr (R > 1) KT_IN_REGISTER(key[v]);
      }
      KT_UNROLL
      for (int r = 0; r < R; ++r) {
        const typename S::F x = S::set1(q[r * size + c]);
        KT_UNROLL
        for (int v = 0; v < V; ++v) sum[v][r] = add_product<S>(sum[v][r], key[v], x);
      }
    }
    store_sums<S>(sum, out, v0);
  }
}

// acc [R][...] += p [R][positions of a page] times `count` positions of 32 columns of values; `ahead` as
// above.
template <class S, class E, int R>
KT_NOINLINE static void mix_rows(const float* p, const typename E::T* values, int64_t stride,
                                 int64_t count, int64_t ahead, float* acc, int64_t acc_stride) {
  constexpr int V = vectors_at_once<S>(R, S::kFloatCells);
  for (int v0 = 0; v0 < static_cast<int>(kGroup) / S::kLanes; v0 += V) {
    const typename E::T* from = values + v0 * S::kLanes;
    typename S::F sum[V][R];
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) sum[v][r] = S::load(acc + r * acc_stride + (v0 + v) * S::kLanes);
    }
    for (int64_t i = 0; i < count; ++i, from += stride) {
      typename S::F value[V];
      KT_UNROLL
      for (int v = 0; v < V; ++v) {
        S::prefetch(reinterpret_cast<const uint8_t*>(from + v * S::kLanes + ahead));
        value[v] = E::load(from + v * S::kLanes);
        if constexpr (R > 1) KT_IN_REGISTER(value[v]);
      }
      KT_UNROLL
      for (int r = 0; r < R; ++r) {
        const typename S::F x = S::set1(p[r * kPagePositions + i]);
        KT_UNROLL
        for (int v = 0; v < V; ++v) sum[v][r] = add_product<S>(sum[v][r], value[v], x);
      }
    }
    KT_UNROLL
    for (int v = 0; v < V; ++v) {
      KT_UNROLL
      for (int r = 0; r < R; ++r) S::store(acc + r * acc_stride + (v0 + v) * S::kLanes, sum[v][r]);
    }
  }
}

// Calls f<R>(first row) for all rows, R of them at a time.
template <class S, int R = S::kFloatRows, class F>
static KT_INLINE void by_rows(int64_t first, int64_t end, F&& f) {
  for (; end - first >= R; first += R) f(first, std::integral_constant<int, R>());
  if constexpr (R > 1) by_rows<S, (R > 8 ? 8 : R / 2)>(first, end, f);
}

// What a tile's rows have summed over some positions: the largest score, the sum of powers relative to
// it, and the same of values.
struct Mixed {
  float* top;    // [kAttentionRows]
  float* total;  // [kAttentionRows]
  float* acc;    // [kAttentionRows][stride]
};

static KT_INLINE int64_t acc_stride(const KvPages& pages) {
  return round_up(pages.value_size, kGroup);
}
static KT_INLINE Mixed mixed_at(float* at) {
  return {at, at + kAttentionRows, at + 2 * kAttentionRows};
}

template <class S>
static KT_INLINE float exp1(float x) {
  alignas(64) float out[S::kLanes];
  S::store(out, exp<S>(S::set1(x)));
  return out[0];
}

// a = a and b: b's positions follow a's.
template <class S>
static void fold(const Mixed& a, const Mixed& b, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if (b.total[r] == 0.0f) continue;  // the row sees none of them
    const float top = b.top[r] > a.top[r] ? b.top[r] : a.top[r];
    const float keep = exp1<S>(a.top[r] - top), take = exp1<S>(b.top[r] - top);
    a.top[r] = top;
    a.total[r] = a.total[r] * keep + b.total[r] * take;
    const typename S::F keeps = S::set1(keep), takes = S::set1(take);
    for (int64_t c = r * stride; c < (r + 1) * stride; c += S::kLanes) {
      const typename S::F mine = S::mul(S::load(a.acc + c), keeps);
      S::store(a.acc + c, S::fma(S::load(b.acc + c), takes, mine));
    }
  }
}

template <class S, class E>
struct Attend {
  const AttentionJob& job;
  const AttentionTile& tile;
  float* q;       // [rows][key_size], times scale
  float* scores;  // [rows][kPagePositions]
  float* tail;    // [kPagePositions][kGroup]: the last columns of values, padded
  float* turned;  // [key_size][kPagePositions]: a latent page's keys, column by column
  float* tiles;   // attention_tile_floats()

  int64_t sees[kAttentionRows];  // how many positions a row sees

  int64_t group() const { return job.heads / job.pages.heads; }
  int64_t token(int64_t row) const { return (tile.first + row) / group(); }
  int64_t seen(int64_t row) const { return sees[row]; }

  void load_queries() const {
    constexpr int V = Rows32<S>::kVectors;
    const int64_t size = job.pages.key_size;
    const typename S::F scale = S::set1(job.scale);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t head = tile.kv_head * group() + (tile.first + r) % group();
      const ConstRows from = job.query.row(job.query_begin[tile.sequence] + token(r), head);
      for (int64_t c = 0; c < size; c += kGroup) {
        const int64_t count = size - c < kGroup ? size - c : kGroup;
        typename S::F v[V];
        Rows32<S>::load(from, 0, c, count, v);
        for (auto& each : v) each = S::mul(each, scale);
        Rows32<S>::store({q + r * size, 0, DType::f32}, 0, c, count, v);
      }
    }
#if defined(KTCORE_TILES)
    if (E::kBf16s > 0 && !job.pages.latent) {
      PageTiles<S, E>(job.pages, tiles).load_queries(q, tile.rows);
    }
#endif
  }

  // The rows' powers of the scores of one page, in place of these; what they summed so far is brought
  // in line with the new largest score. As many rows at a time as a vector has lanes, with a lane for each where
  // they are compared and summed up.
  void soften(const Mixed& sum, int64_t first, int64_t begin) const {
    constexpr int V = static_cast<int>(kPagePositions) / S::kLanes, L = S::kLanes;
    const int64_t stride = acc_stride(job.pages);
    for (int64_t from = first / L * L; from < tile.rows; from += L) {
      const int64_t end = from + L < tile.rows ? from + L : tile.rows;
      alignas(64) float tops[L], keeps[L], totals[L];
      typename S::F lanes[L];
      for (int i = 0; i < L; ++i) {
        const int64_t r = from + i;
        lanes[i] = S::set1(kNone);
        if (r < first || r >= end) continue;
        float* s = scores + r * kPagePositions;
        for (int64_t at = seen(r) - begin; at < kPagePositions; ++at) s[at] = kNone;
        lanes[i] = S::load(s);
        for (int v = 1; v < V; ++v) lanes[i] = S::max(lanes[i], S::load(s + v * L));
      }
      S::transpose(lanes);
      for (int n = L / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) lanes[i] = S::max(lanes[i], lanes[i + n]);
      }
      const typename S::F before = S::load(sum.top + from);
      const typename S::F top = S::max(lanes[0], before);  // of NaN and a number the latter
      S::store(tops, top);
      S::store(keeps, exp<S>(S::sub(before, top)));
      for (int i = 0; i < L; ++i) {
        const int64_t r = from + i;
        lanes[i] = S::zero();
        if (r < first || r >= end) continue;
        float* s = scores + r * kPagePositions;
        for (int v = 0; v < V; ++v) {
          const typename S::F power = exp<S>(S::sub(S::load(s + v * L), S::set1(tops[i])));
          S::store(s + v * L, power);
          lanes[i] = S::add(lanes[i], power);
        }
      }
      S::transpose(lanes);
      for (int n = L / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) lanes[i] = S::add(lanes[i], lanes[i + n]);
      }
      S::store(totals, lanes[0]);
      for (int64_t r = from < first ? first : from; r < end; ++r) {
        const int64_t i = r - from;
        if (tops[i] != sum.top[r]) {
          sum.top[r] = tops[i];
          sum.total[r] *= keeps[i];
          const typename S::F factor = S::set1(keeps[i]);
          for (int64_t c = r * stride; c < (r + 1) * stride; c += L) {
            S::store(sum.acc + c, S::mul(S::load(sum.acc + c), factor));
          }
        }
        sum.total[r] += totals[i];
      }
    }
  }

  // Elements from one position's values to the next.
  int64_t value_row() const { return job.pages.latent ? job.pages.key_size : job.pages.value_size; }

  // A latent page's first `count` positions, column by column.
  void turn(const typename E::T* rows, int64_t count) const {
    constexpr int V = Rows32<S>::kVectors, L = S::kLanes;
    const int64_t size = job.pages.key_size;
    for (int64_t p = 0; p < kPagePositions; p += L) {
      for (int64_t c = 0; c < size; c += kGroup) {
        const int64_t columns = size - c < kGroup ? size - c : kGroup;
        typename S::F block[V][L];
        for (int r = 0; r < L; ++r) {
          typename S::F v[V];
          for (auto& each : v) each = S::zero();
          if (p + r < count) {
            Rows32<S>::load({rows + (p + r) * size, 0, job.pages.dtype}, 0, c, columns, v);
          }
          for (int i = 0; i < V; ++i) block[i][r] = v[i];
        }
        for (int i = 0; i < V; ++i) {
          S::transpose(block[i]);
          for (int r = 0; r < L && i * L + r < columns; ++r) {
            S::store(turned + (c + i * L + r) * kPagePositions + p, block[i][r]);
          }
        }
      }
    }
  }

  void mix(const Mixed& sum, int64_t first, int64_t end, const typename E::T* values, int64_t count,
           int64_t ahead) const {
    const int64_t size = job.pages.value_size, stride = acc_stride(job.pages);
    const int64_t whole = size / kGroup * kGroup;
    by_rows<S>(first, end, [&](int64_t r, auto n) {
      const float* p = scores + r * kPagePositions;
      for (int64_t c = 0; c < whole; c += kGroup) {
        mix_rows<S, E, decltype(n)::value>(p, values + c, value_row(), count, ahead,
                                           sum.acc + r * stride + c, stride);
      }
      if (whole < size) {
        mix_rows<S, KvF32<S>, decltype(n)::value>(p, tail, kGroup, count, 0,
                                                  sum.acc + r * stride + whole, stride);
      }
    });
  }

  // The last columns of values, where they are not a whole group.
  void load_tail(const typename E::T* values, int64_t count) const {
    const int64_t size = job.pages.value_size, whole = size / kGroup * kGroup;
    if (whole == size) return;
    constexpr int V = Rows32<S>::kVectors;
    for (int64_t i = 0; i < count; ++i) {
      typename S::F v[V];
      Rows32<S>::load({values + i * value_row(), 0, job.pages.dtype}, 0, whole, size - whole, v);
      for (int k = 0; k < V; ++k) S::store(tail + i * kGroup + k * S::kLanes, v[k]);
    }
  }

  // Sums over positions [begin, end), whole pages but the last.
  void span(int64_t begin, int64_t end, const Mixed& sum) const {
    const KvPages& pages = job.pages;
    std::memset(sum.acc, 0, static_cast<size_t>(tile.rows * acc_stride(pages)) * sizeof(float));
    for (int64_t r = 0; r < tile.rows; ++r) {
      sum.top[r] = kNone;
      sum.total[r] = 0.0f;
    }
    const int32_t* table = job.page_table + tile.sequence * job.table_stride;
#if defined(KTCORE_TILES)
    const TileScope scope(2, 16);
#endif
    int64_t first = 0;  // rows see more the later they are
    for (; begin < end; begin += kPagePositions) {
      while (seen(first) <= begin) ++first;
      const int64_t page = table[begin / kPagePositions];
      const bool last = begin + kPagePositions >= end;
      const int64_t pages_on = last ? 0 : table[begin / kPagePositions + 1] - page;
      const auto* keys = static_cast<const typename E::T*>(pages.keys) + page * pages.key_stride +
                         tile.kv_head * pages.key_size * kPagePositions;
      const auto* values = static_cast<const typename E::T*>(pages.values) +
                           page * pages.value_stride +
                           tile.kv_head * pages.value_size * kPagePositions;
      const auto score = [&]<class K>(const typename K::T* columns, float* out) {
        by_rows<S>(first, tile.rows, [&](int64_t r, auto n) {
          score_rows<S, K, decltype(n)::value>(
              q + r * pages.key_size, pages.key_size, columns,
              std::is_same_v<K, E> ? pages_on * pages.key_stride : 0, out + r * kPagePositions);
        });
      };
      const auto count = [&](int64_t row) {
        const int64_t n = seen(row) - begin;
        return n < kPagePositions ? n : kPagePositions;
      };
      const int64_t most = count(tile.rows - 1);
      int64_t mixed = first;  // rows before this one
#if defined(KTCORE_TILES)
      if (E::kBf16s > 0 && !pages.latent) {
        const PageTiles<S, E> page(pages, tiles);
        const uint32_t spoiled =
            page.score(keys, pages_on * pages.key_stride, most, first, tile.rows, scores);
        if (spoiled != 0) {
          alignas(64) float plain[kAttentionRows * kPagePositions];
          score.template operator()<E>(keys, plain);
          for (int64_t at = first * kPagePositions; at < tile.rows * kPagePositions; ++at) {
            if (spoiled >> at % kPagePositions & 1) scores[at] = plain[at];
          }
        }
        soften(sum, first, begin);
        const int64_t finite = page.load_values(values, pages_on * pages.value_stride, most);
        while (mixed < tile.rows && count(mixed) <= finite) ++mixed;
        page.mix(scores, first, mixed, count, sum.acc, acc_stride(pages));
        if (mixed == tile.rows) continue;
      } else
#endif
      {
        if (pages.latent) {
          turn(keys, end - begin);
          score.template operator()<KvF32<S>>(turned, scores);
        } else {
          score.template operator()<E>(keys, scores);
        }
        soften(sum, first, begin);
      }
      load_tail(values, most);
      for (int64_t r = mixed; r < tile.rows;) {  // no row touches what it does not see
        int64_t next = r + 1;
        while (next < tile.rows && count(next) == count(r)) ++next;
        mix(sum, r, next, values, count(r), pages_on * pages.value_stride);
        r = next;
      }
    }
  }

  int64_t span_end(int64_t i) const {
    const int64_t end = (i + 1) * kSpanPositions, all = seen(tile.rows - 1);
    return end < all ? end : all;
  }

  void finish(const Mixed& sum) const {
    constexpr int V = Rows32<S>::kVectors;
    const int64_t size = job.pages.value_size, stride = acc_stride(job.pages);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t head = tile.kv_head * group() + (tile.first + r) % group();
      const Rows out = job.out.row(job.query_begin[tile.sequence] + token(r), head);
      const typename S::F total = S::set1(sum.total[r]);
      for (int64_t c = 0; c < size; c += kGroup) {
        typename S::F v[V];
        for (int i = 0; i < V; ++i) {
          v[i] = S::div(S::load(sum.acc + r * stride + c + i * S::kLanes), total);
        }
        Rows32<S>::store(out, 0, c, size - c < kGroup ? size - c : kGroup, v);
      }
    }
  }
};

template <class S, class E>
static void attention_of(const AttentionJob& job, ThreadPool& pool) {
  const KvPages& pages = job.pages;
  const int64_t stride = acc_stride(pages), mixed = attention_part_floats(pages);
  const auto attend = [&](const AttentionTile& tile, int thread) {
    float* work = job.work + thread * attention_work_floats(pages) + 2 * mixed;
    float* scores = work + kAttentionRows * pages.key_size;
    float* tail = scores + kAttentionRows * kPagePositions;
    float* turned = tail + kPagePositions * kGroup;
    float* tiles = turned + (pages.latent ? pages.key_size * kPagePositions : 0);
    Attend<S, E> a{job, tile, work, scores, tail, turned, tiles, {}};
    const int64_t* begin = job.query_begin + tile.sequence;
    const int64_t before = job.lengths[tile.sequence] - (begin[1] - begin[0]);
    for (int64_t r = 0; r < tile.rows; ++r) a.sees[r] = before + a.token(r) + 1;
    return a;
  };
  if (job.parts > 0) {
    parallel_for(pool, job.parts, [&](int64_t part, int thread) {
      const AttentionTile& tile = job.tiles[job.part_tile[part]];
      const int64_t i = part - tile.first_part;
      const Attend<S, E> a = attend(tile, thread);
      a.load_queries();
      a.span(i * kSpanPositions, a.span_end(i), mixed_at(job.part + part * mixed));
    });
    parallel_for(pool, job.tile_count, [&](int64_t n, int thread) {
      const AttentionTile& tile = job.tiles[n];
      const Mixed sum = mixed_at(job.part + tile.first_part * mixed);
      for (int64_t i = 1; i < tile.spans; ++i) {
        fold<S>(sum, mixed_at(job.part + (tile.first_part + i) * mixed), tile.rows, stride);
      }
      attend(tile, thread).finish(sum);
    });
    return;
  }
  parallel_for(pool, job.tile_count, [&](int64_t n, int thread) {
    const AttentionTile& tile = job.tiles[n];
    const Attend<S, E> a = attend(tile, thread);
    float* at = job.work + thread * attention_work_floats(pages);
    const Mixed sum = mixed_at(at), next = mixed_at(at + mixed);
    a.load_queries();
    a.span(0, a.span_end(0), sum);
    for (int64_t i = 1; i < tile.spans; ++i) {
      a.span(i * kSpanPositions, a.span_end(i), next);
      fold<S>(sum, next, tile.rows, stride);
    }
    a.finish(sum);
  });
}

template <class S>
static void attention(const AttentionJob& job, ThreadPool& pool) {
  if (job.pages.dtype == DType::f32) return attention_of<S, KvF32<S>>(job, pool);
  if (job.pages.dtype == DType::f16) return attention_of<S, KvF16<S>>(job, pool);
  return attention_of<S, KvBf16<S>>(job, pool);
}

// Writes keys and values of tokens where their slots are. Numbers that float16 cannot hold become its
// largest; what is not finite stays so.
template <class S, class T>
static void store_kv_as(const StoreKvJob& job, ThreadPool& pool) {
  constexpr int V = Rows32<S>::kVectors;
  const KvPages& pages = job.pages;
  const auto convert = [&](const ConstRows& from, int64_t c, int64_t count, T* to) {
    typename S::F v[V];
    Rows32<S>::load(from, 0, c, count, v);
    if (pages.dtype == DType::f16) {
      for (auto& x : v) {
        const typename S::F most = S::set1(65504.0f), least = S::set1(-65504.0f);
        x = S::add(S::min(most, S::max(least, x)), S::sub(x, x));
      }
    }
    Rows32<S>::store({to, 0, pages.dtype}, 0, 0, count, v);
  };
  for_token_ranges(
      pool, job.tokens, pages.heads * (pages.key_size + pages.value_size),
      [&](int64_t first, int64_t end) {
        for (int64_t t = first; t < end; ++t) {
          if (job.slots[t] < 0) continue;
          const int64_t page = job.slots[t] / kPagePositions, at = job.slots[t] % kPagePositions;
          for (int64_t h = 0; h < pages.heads; ++h) {
            T* key = static_cast<T*>(pages.keys) + page * pages.key_stride +
                     h * pages.key_size * kPagePositions + at;
            T* value = static_cast<T*>(pages.values) + page * pages.value_stride +
                       (h * kPagePositions + at) * pages.value_size;
            T columns[kGroup];
            if (pages.latent) {
              T* to = static_cast<T*>(pages.keys) + page * pages.key_stride + at * pages.key_size;
              for (int64_t c = 0; c < pages.key_size; c += kGroup) {
                const int64_t count = pages.key_size - c < kGroup ? pages.key_size - c : kGroup;
                convert(job.key.row(t, h), c, count, columns);
                std::memcpy(to + c, columns, static_cast<size_t>(count) * sizeof(T));
              }
              continue;
            }
            for (int64_t c = 0; c < pages.key_size; c += kGroup) {
              const int64_t count = pages.key_size - c < kGroup ? pages.key_size - c : kGroup;
              convert(job.key.row(t, h), c, count, columns);
              for (int64_t i = 0; i < count; ++i) key[(c + i) * kPagePositions] = columns[i];
            }
            for (int64_t c = 0; c < pages.value_size; c += kGroup) {
              const int64_t count = pages.value_size - c < kGroup ? pages.value_size - c : kGroup;
              convert(job.value.row(t, h), c, count, columns);
              std::memcpy(value + c, columns, static_cast<size_t>(count) * sizeof(T));
            }
          }
        }
      });
}

template <class S>
static void store_kv(const StoreKvJob& job, ThreadPool& pool) {
  if (job.pages.dtype == DType::f32) return store_kv_as<S, float>(job, pool);
  store_kv_as<S, uint16_t>(job, pool);
}

}  // namespace ktcore::KTCORE_ISA
