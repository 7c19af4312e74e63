#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace elastic {

// fn(i) for i in [0, n), shared between n_threads threads (the caller's included).
// The first exception is rethrown here, after all threads have stopped.
template <typename F> void parallel_for(int32_t n, int32_t n_threads, F && fn) {
    n_threads = std::max(1, std::min(n_threads, n));

    std::atomic<int32_t> next{ 0 };
    std::exception_ptr   failure;
    std::mutex           mutex;

    const auto work = [&] {
        try {
            for (int32_t i = next++; i < n; i = next++) {
                fn(i);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            failure = failure ? failure : std::current_exception();
            next    = n;
        }
    };

    std::vector<std::thread> threads;
    threads.reserve(n_threads - 1);
    for (int32_t t = 1; t < n_threads; ++t) {
        try {
            threads.emplace_back(work);
        } catch (const std::system_error &) {
            break;  // no more threads to be had: those there are do the work
        }
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

}  // namespace elastic
