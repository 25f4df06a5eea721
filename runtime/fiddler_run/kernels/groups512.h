// Included by variants.h in each namespace with AVX-512: unpacks a group of lossless12. A function
// for another instruction set could not be inlined.

constexpr int PARTS = 1;
template <int PART, class F>
inline void each_of_group(const uint8_t* lows, const uint8_t* codes, const HighBytes& high, F&& f) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(&high)));
    // The shuffle port is the bottleneck; a broadcast from memory and a shift do not use it.
    const __m512i both = _mm512_broadcast_i64x4(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i upper_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i places = _mm512_srlv_epi16(both, upper_half);
    const __m512i upper =
        _mm512_shuffle_epi8(table, _mm512_and_si512(places, _mm512_set1_epi8(15)));
    const __m512i lower = _mm512_loadu_si512(lows);
    f(0, _mm512_unpacklo_epi8(lower, upper));
    f(32, _mm512_unpackhi_epi8(lower, upper));
}
