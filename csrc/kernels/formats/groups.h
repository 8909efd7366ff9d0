// The scales and offsets of a block's groups.
#pragma once

namespace ktcore::KTCORE_ISA {

// Goes through a block's groups: where each is, and its scales and offsets, of up to kSets sets, as
// floats. See packed.h for how they lie and combine; kNibbles: whether inner ones may share bytes.
template <class S, int kSets, bool kNibbles = false>
class Groups {
 public:
  KT_INLINE Groups(const WeightLayout& layout, int64_t code_bytes, const uint8_t* block)
      : layout_(layout),
        code_bytes_(code_bytes),
        both_sets_(layout.outer_sets() == 2),
        nibbles_(kNibbles && layout.inner_nibbles),
        block_(block),
        group_bytes_(layout.group_bytes()),
        scale_lines_((layout.inner_bytes() + (layout.span == 1 ? layout.outer_bytes() : 0)) / 64 *
                     64),
        inner_bytes_(layout.inner_bytes()),
        outer_bytes_(layout.outer_bytes()) {}

  KT_INLINE bool has_offsets() const { return layout_.offsets || layout_.inner_offsets; }
  // Whether the next group has other outer scales.
  KT_INLINE bool ends_span() const { return left_ == 1; }

  // Goes to group g, or to the next one, and makes the outer scales of V vectors from v0 on ready.
  template <int V>
  KT_INLINE const uint8_t* begin(int64_t g, int v0) {
    left_ = layout_.span - g % layout_.span;
    group_ = block_ + layout_.group_at(g);
    convert<V>(block_ + layout_.outer_at(g), v0);
    return group_;
  }
  template <int V>
  KT_INLINE const uint8_t* next(int v0) {
    group_ += group_bytes_;
    if (--left_ > 0) return group_;
    left_ = layout_.span;
    const uint8_t* outer = kSets == 2 ? group_ - inner_bytes_ : group_;
    group_ += outer_bytes_;
    convert<V>(outer, v0);
    return group_;
  }

  // Asks for the lines that every group's scales, behind its codes, fill: 2 % with Q4_K, 3 with 5 and 6 bits, 10 with
  // Q3_K. Those that share a line with codes come with these, and asking for them as well costs 1 %.
  KT_INLINE void ask_scales(const uint8_t* group, Prefetch prefetch) const {
    for (int64_t at = 0; at < scale_lines_; at += 64) {
      ask_ahead<S>(group + code_bytes_ + at, prefetch);
    }
  }

  // Of vector v of a set, the outer factor alone.
  KT_INLINE typename S::F outer(int set, int v) const {
    return S::load(scale_[both_sets_ ? set : 0] + v * S::kLanes);
  }
  KT_INLINE typename S::F outer_offset(int set, int v) const {
    return S::load((layout_.offsets ? offset_ : scale_)[both_sets_ ? set : 0] + v * S::kLanes);
  }
  // A set's inner scales, where there are any, and its inner offsets, or 1.
  KT_INLINE typename S::I inner_scale(const uint8_t* group, int set, int v) const {
    const uint8_t* at = inner_at(group, set, v);
    return nibbles_ ? S::and_i(S::load_u8(at), S::set1_i32(15)) : S::load_i8(at);
  }
  KT_INLINE typename S::F inner_offset(const uint8_t* group, int set, int v) const {
    if (!layout_.inner_offsets) return S::set1(1);
    if (nibbles_) {
      return S::to_f32(S::template shift16<4>(S::load_u8(inner_at(group, set, v))));
    }
    return S::to_f32(S::load_i8(inner_at(group, layout_.inner_scales ? kSets + set : set, v)));
  }
  // The scales and offsets of a group's set: of V vectors from v0 on, or of one.
  template <int V>
  KT_INLINE void scales(const uint8_t* group, int set, int v0, typename S::F (&to)[V]) const {
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = outer(set, v0 + v);
    if (!layout_.inner_scales) return;
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = S::mul(to[v], S::to_f32(inner_scale(group, set, v0 + v)));
  }
  template <int V>
  KT_INLINE void offsets(const uint8_t* group, int set, int v0, typename S::F (&to)[V]) const {
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = outer_offset(set, v0 + v);
    if (!layout_.inner_offsets) return;
    KT_UNROLL
    for (int v = 0; v < V; ++v) to[v] = S::mul(to[v], inner_offset(group, set, v0 + v));
  }
  KT_INLINE typename S::F scale(const uint8_t* group, int set, int v) const {
    typename S::F of_vector[1];
    scales<1>(group, set, v, of_vector);
    return of_vector[0];
  }
  KT_INLINE typename S::F offset(const uint8_t* group, int set, int v) const {
    typename S::F of_vector[1];
    offsets<1>(group, set, v, of_vector);
    return of_vector[0];
  }

 private:
  // Where set number `set` is, of inner scales or, behind them, inner offsets.
  KT_INLINE const uint8_t* inner_at(const uint8_t* group, int set, int v) const {
    const uint8_t* first = kSets == 2 ? group - inner_bytes_ : group + code_bytes_;
    return first + set * kBlockRows + v * S::kLanes;
  }
  template <int V>
  KT_INLINE void convert(const uint8_t* p, int v0) {
    convert_set<V>(p, v0, scale_[0]);
    if (kSets == 2 && both_sets_) convert_set<V>(p + layout_.set_bytes(), v0, scale_[kSecond]);
    if (!layout_.offsets) return;
    p += layout_.outer_sets() * layout_.set_bytes();
    convert_set<V>(p, v0, offset_[0]);
    if (kSets == 2 && both_sets_) convert_set<V>(p + layout_.set_bytes(), v0, offset_[kSecond]);
  }
  template <int V>
  KT_INLINE void convert_set(const uint8_t* p, int v0, float* to) const {
    for (int v = v0; v < v0 + V; ++v) {
      const int64_t at = v * S::kLanes;
      S::store(to + at, scales_at(p, at));
    }
  }
  KT_INLINE typename S::F scales_at(const uint8_t* p, int64_t at) const {
    const auto* half = reinterpret_cast<const uint16_t*>(p) + at;
    switch (layout_.scale_type) {
      case ScaleType::f32: return S::load(reinterpret_cast<const float*>(p) + at);
      case ScaleType::f16: return S::load_f16(half);
      case ScaleType::bf16: return S::load_bf16(half);
      default: return S::load_e8m0(p + at);
    }
  }

  static constexpr int kSecond = kSets == 2 ? 1 : 0;
  const WeightLayout& layout_;
  const int64_t code_bytes_;
  const bool both_sets_, nibbles_;
  const uint8_t* block_;
  const int64_t group_bytes_, scale_lines_, inner_bytes_, outer_bytes_;
  const uint8_t* group_ = nullptr;
  int64_t left_ = 0;  // groups that have the outer scales at hand, this one included
  alignas(64) float scale_[kSets == 2 ? 2 : 1][kBlockRows];
  alignas(64) float offset_[kSets == 2 ? 2 : 1][kBlockRows];
};

}  // namespace ktcore::KTCORE_ISA
