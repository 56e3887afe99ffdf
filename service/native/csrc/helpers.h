// A thread pool whose helpers compute chunks of another thread's job, and are never waited for long.
//
// Every free thread takes the next chunk from a counter. A helper that loses its core while it has a chunk (to the API
// process, or to another virtual machine) does not delay the job: after a while, the job's thread computes that chunk again
// itself. So helpers write to memory of their own, and the job's thread collects their results from there. A late helper
// may still read its job's inputs, so arguments are copied, and tensors are kept alive until it has returned.

#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

constexpr std::align_val_t kLine{64};  // a cache line, so that no vector crosses two

struct Free {
    void operator()(float* floats) const { ::operator delete(floats, kLine); }
};

using Memory = std::unique_ptr<float[], Free>;

inline Memory memory_for(int64_t floats) {
    return Memory(static_cast<float*>(::operator new(floats * sizeof(float), kLine)));
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Helpers {
public:
    // Sets the number of helpers: `normal` threads, and `idle_priority` ones, which run only on idle cores.
    void set(int normal, int idle_priority) {
        if (is_child_) return;
        const std::lock_guard<std::mutex> lock(sharing_);
        forget_returned();
        int left[] = {normal, idle_priority};
        for (const auto& helper : helpers_) helper->is_on = left[helper->has_idle_priority]-- > 0;
        for (const bool has_idle_priority : {false, true})
            for (; left[has_idle_priority] > 0; left[has_idle_priority]--) {
                helpers_.push_back(std::make_unique<Helper>(has_idle_priority));
                std::thread([this, own = helpers_.back().get()] { help(*own); }).detach();
            }
        asleep_ = true;  // else a helper about to sleep would miss that it has been switched on
        wake();
        static const int at_fork = pthread_atfork(nullptr, nullptr, [] {  // a child process has no helpers
            the().is_child_ = true;
            the().count_ = 0;
        });
        count_ = at_fork == 0 ? normal + idle_priority : 0;
    }

    int count() const { return count_.load(std::memory_order_relaxed); }

    // The number of chunks that were computed again because a helper was late.
    int64_t repeated() const { return repeated_.load(std::memory_order_relaxed); }

    // Runs a job of `count` chunks: compute(chunk, block), on this thread or a helper, into a block of `floats` floats; then
    // place(chunk, block), on this thread. Helpers get a copy of `compute` with the pointers in it. `keep` returns owners of
    // the memory that these point to, other than Floats, in case a helper is late. `block` is this thread's own. While
    // another thread has a job, this one computes alone.
    template <typename Compute, typename Place, typename Keep>
    void share(int64_t count, int64_t floats, const Compute& compute, const Place& place, const Keep& keep, float* block) {
        const std::unique_lock<std::mutex> lock(sharing_, std::try_to_lock);
        if (lock) forget_returned();
        if (!lock || count_ == 0 || count < 2) return alone(count, compute, place, block);
        left_.assign(count, true);
        post(uint32_t(count), floats, compute);
        try {
            work(count, floats, compute, place, keep, block);
        } catch (...) {  // out of memory, while helpers are still at work
            next_.store(tagged(job_, UINT32_MAX));
            mark_late(keep);
            throw;
        }
    }

    // Runs a job without helpers.
    template <typename Compute, typename Place>
    static void alone(int64_t count, const Compute& compute, const Place& place, float* block) {
        for (int64_t chunk = 0; chunk < count; chunk++) {
            compute(chunk, block);
            place(chunk, block);
        }
    }

    // Frees memory once no helper can still read it.
    void retire(Memory memory) {
        const std::lock_guard<std::mutex> lock(retiring_);
        if (is_late_) retired_.push_back(std::move(memory));
    }

    static Helpers& the() {
        static Helpers& helpers = *new Helpers;  // never destroyed: threads use it until the process ends
        return helpers;
    }

private:
    using Clock = std::chrono::steady_clock;

    static constexpr int kWords = 64;                             // of a job's arguments, at most
    static constexpr uint32_t kHeld = 8;                          // computed blocks that a helper may hold uncollected
    static constexpr auto kAwake = std::chrono::milliseconds(2);  // how long an idle helper polls before it sleeps
    static constexpr auto kPatience = std::chrono::microseconds(5);
    static constexpr int kChunksOfPatience = 3;
    static constexpr int kPauses = 16;  // between two readings of the clock

    // A job's number in the upper half, another number in the lower one, so that jobs are never confused.
    static uint64_t tagged(uint32_t job, uint32_t number) { return uint64_t(job) << 32 | number; }
    static uint32_t number_of(uint64_t tagged, uint32_t job) { return tagged >> 32 == job ? uint32_t(tagged) : 0; }

    struct alignas(64) Helper {
        std::atomic<uint64_t> done{0};         // chunks that it has computed
        std::atomic<uint64_t> taken{0};        // chunks that have been collected from it
        std::atomic<uint32_t> chunks[kHeld]{};  // their numbers, the n-th at n % kHeld, like its block
        std::atomic<const float*> blocks{nullptr};
        std::atomic<uint32_t> inside{0};  // the job whose inputs it may be reading; 0: none
        std::atomic<bool> is_on{true};
        const bool has_idle_priority;
        Memory memory;
        int64_t size = 0;

        explicit Helper(bool has_idle_priority) : has_idle_priority(has_idle_priority) {}
    };

    struct Late {
        uint32_t job;
        std::vector<std::shared_ptr<void>> kept;
    };

    template <typename Compute, typename Place, typename Keep>
    void work(int64_t count, int64_t floats, const Compute& compute, const Place& place, const Keep& keep, float* block) {
        int64_t left = count, own = 0;
        const auto finish = [&](uint32_t chunk, const float* result) {
            place(chunk, result);
            left_[chunk] = false;
            left--;
        };
        const Clock::time_point started = Clock::now();
        uint32_t chunk;
        bool is_mine = claim(job_, uint32_t(count), chunk);  // before helpers wake up, who could take all chunks
        if (asleep_.exchange(false)) wake();
        for (; is_mine; is_mine = claim(job_, uint32_t(count), chunk), own++) {
            compute(chunk, block);
            finish(chunk, block);
            collect(floats, finish);
        }
        const Clock::time_point now = Clock::now();
        const Clock::time_point end = now + kPatience + kChunksOfPatience * (now - started) / std::max<int64_t>(own, 1);
        for (collect(floats, finish); left && Clock::now() < end; collect(floats, finish))
            for (int i = 0; i < kPauses; i++) pause();
        if (!left) return;
        mark_late(keep);
        for (int64_t number = 0; number < count; number++) {
            if (!left_[number]) continue;
            compute(number, block);
            place(number, block);
            repeated_.fetch_add(1, std::memory_order_relaxed);
        }
    }

    // Keeps the present job's inputs alive until all helpers have returned from it.
    template <typename Keep>
    void mark_late(const Keep& keep) {
        is_late_ = true;
        late_.push_back({job_, keep()});
    }

    template <typename Compute>
    void post(uint32_t count, int64_t floats, const Compute& compute) {
        static_assert(std::is_trivially_copyable_v<Compute> && sizeof(Compute) <= kWords * sizeof(uint64_t));
        const uint32_t job = std::max<uint32_t>(job_ + 1, 1);
        next_.store(tagged(job, UINT32_MAX), std::memory_order_relaxed);  // no chunk can be claimed while the rest changes
        std::atomic_thread_fence(std::memory_order_release);
        uint64_t words[kWords];
        std::memcpy(words, &compute, sizeof compute);
        constexpr int kOwn = (sizeof compute + 7) / 8;
        for (int i = 0; i < kOwn; i++) words_[i].store(words[i], std::memory_order_relaxed);
        used_words_.store(kOwn, std::memory_order_relaxed);
        const auto run = [](const uint64_t* own, int64_t chunk, float* block) {
            (*reinterpret_cast<const Compute*>(own))(chunk, block);
        };
        run_.store(run, std::memory_order_relaxed);
        chunks_.store(count, std::memory_order_relaxed);
        floats_.store(floats, std::memory_order_relaxed);
        next_.store(tagged(job, 0), std::memory_order_release);
        job_.store(job);
    }

    bool claim(uint32_t job, uint32_t count, uint32_t& chunk) {
        uint64_t next = next_.load(std::memory_order_acquire);
        while (next >> 32 == job && uint32_t(next) < count)
            if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
                chunk = uint32_t(next);
                return true;
            }
        return false;
    }

    // Collects the chunks of the present job that helpers have computed since the last call.
    template <typename Finish>
    void collect(int64_t floats, const Finish& finish) {
        for (const auto& helper : helpers_) {
            const uint32_t done = number_of(helper->done.load(std::memory_order_acquire), job_);
            uint32_t taken = number_of(helper->taken.load(std::memory_order_relaxed), job_);
            if (taken == done) continue;
            for (; taken < done; taken++)
                finish(helper->chunks[taken % kHeld].load(std::memory_order_relaxed),
                       helper->blocks.load(std::memory_order_relaxed) + taken % kHeld * floats);
            helper->taken.store(tagged(job_, taken), std::memory_order_release);
        }
    }

    void forget_returned() {
        const auto is_back = [&](const Late& late) {
            return std::none_of(helpers_.begin(), helpers_.end(), [&](const auto& own) { return own->inside == late.job; });
        };
        if (late_.empty()) return;
        late_.erase(std::remove_if(late_.begin(), late_.end(), is_back), late_.end());
        if (!late_.empty()) return;
        const std::lock_guard<std::mutex> lock(retiring_);
        is_late_ = false;
        retired_.clear();
    }

    void help(Helper& own) {
        const sched_param none{};
        if (own.has_idle_priority) sched_setscheduler(0, SCHED_IDLE, &none);  // cannot be undone without privileges
        for (uint32_t seen = 0;;) {
            seen = wait_for_another(own, seen);
            own.inside = seen;
            compute_some(own, seen);
            own.inside = 0;
        }
    }

    uint32_t wait_for_another(const Helper& own, uint32_t seen) {
        for (;;) {
            const uint32_t latest = job_;
            if (!own.is_on) {
                sleep_unless_after(latest);
                continue;
            }
            for (const Clock::time_point end = Clock::now() + kAwake; Clock::now() < end;)
                for (int i = 0; i < kPauses; i++) {
                    if (job_.load(std::memory_order_acquire) != seen) return job_;
                    pause();
                }
            asleep_ = true;  // from here on, the thread that posts a job wakes this one
            sleep_unless_after(seen);
            if (job_ != seen) return job_;
        }
    }

    // A futex, because a thread that leaves a condition variable holds its mutex, even while it waits for its core.
    void sleep_unless_after(uint32_t job) { syscall(SYS_futex, &job_, FUTEX_WAIT_PRIVATE, job, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &job_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

    void compute_some(Helper& own, uint32_t job) {
        uint64_t words[kWords];
        const int used = used_words_.load(std::memory_order_relaxed);
        for (int i = 0; i < used; i++) words[i] = words_[i].load(std::memory_order_relaxed);
        const auto run = run_.load(std::memory_order_relaxed);
        const uint32_t count = chunks_.load(std::memory_order_relaxed);
        const int64_t floats = floats_.load(std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_acquire);  // if these are of another job, no chunk can be claimed
        uint32_t chunk;
        for (uint32_t done = 0;; done++) {
            while (done - number_of(own.taken.load(std::memory_order_acquire), job) >= kHeld) {
                const uint64_t next = next_.load(std::memory_order_relaxed);
                if (next >> 32 != job || uint32_t(next) == UINT32_MAX) return;  // the job is over
                pause();
            }
            if (!claim(job, count, chunk)) return;
            if (own.size < kHeld * floats) {
                own.size = kHeld * floats;
                own.memory = memory_for(own.size);
                own.blocks.store(own.memory.get(), std::memory_order_relaxed);
            }
            run(words, chunk, own.memory.get() + done % kHeld * floats);
            own.chunks[done % kHeld].store(chunk, std::memory_order_relaxed);
            own.done.store(tagged(job, done + 1), std::memory_order_release);
        }
    }

    std::mutex sharing_;  // held by the thread that has a job
    std::vector<std::unique_ptr<Helper>> helpers_;
    std::vector<bool> left_;
    std::vector<Late> late_;
    std::atomic<int> count_{0};
    std::atomic<bool> is_child_{false};  // this process was forked from one with helpers
    std::atomic<int64_t> repeated_{0};

    std::mutex retiring_;
    std::vector<Memory> retired_;
    std::atomic<bool> is_late_{false};

    std::atomic<bool> asleep_{false};  // some helper may be asleep

    alignas(64) std::atomic<uint32_t> job_{0};  // the number of the latest job
    std::atomic<uint64_t> words_[kWords]{};      // its arguments
    std::atomic<int> used_words_{0};
    std::atomic<void (*)(const uint64_t*, int64_t, float*)> run_{nullptr};
    std::atomic<uint32_t> chunks_{0};
    std::atomic<int64_t> floats_{0};
    alignas(64) std::atomic<uint64_t> next_{0};  // the next chunk to be claimed
};

}  // namespace
